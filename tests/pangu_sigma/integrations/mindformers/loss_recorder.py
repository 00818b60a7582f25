"""A process that trains with MindFormers and keeps every loss as it is, not as a rounded log line."""

import json
import os
import sys
from pathlib import Path

from pangu_sigma.errors import UserError
from pangu_sigma.integrations.mindformers import mindformers_job
from pangu_sigma.integrations.mindformers.mindformers_settings import read_yaml


def main(file: str, overrides: list[str]) -> None:
    rank = os.environ.get("RANK_ID", "")
    mindformers_job.environment(Path(read_yaml(file, overrides)["output_dir"]))
    from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
    from mindspore.train import Callback

    class LossRecorder(Callback):
        """Appends the loss of every step to a file of JSON lines, in a run of several processes one each."""

        def __init__(self, path: str) -> None:
            self.path = f"{path}.{rank}" if rank else path

        def on_train_step_end(self, run_context) -> None:
            loss = run_context.original_args().net_outputs[0]
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(float(loss.asnumpy())) + "\n")

    MindFormerRegister.register_cls(LossRecorder, MindFormerModuleType.CALLBACK)
    mindformers_job.train(file, overrides)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except UserError as error:
        sys.exit(f"Error: {error}")
