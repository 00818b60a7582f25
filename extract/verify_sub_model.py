"""Whether a sub-model is the same function: its logits beside its parent's, on the checkpoint's probe sequences.

The parent runs with all its expert groups on batches that mix domains, the sub-model on batches of the same shape, in
which foreign samples pass for a kept domain's and do not count. Evaluation sends rows to experts in blocks of fixed
size, so equal weights give equal bits, whatever else is in the batch or stored. Beside that, every tensor's hash is
compared, because a probe need not reach every expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.checkpoint.float_types import FLOAT_TYPES
from pangu_sigma.errors import UserError, argument
from pangu_sigma.runtime import COMPUTING
from pangu_sigma.trained_model import TrainedModel, trained_from
from pangu_sigma.wording import listed

if TYPE_CHECKING:
    from extract.extraction_plan import ExtractionPlan

BATCH = 4
# A dense layer multiplies all rows at once, an expert blocks of them, which rounds differently.
FOLD_TOLERANCE = 1e-6


class VerificationError(UserError):
    """The sub-model is not the function that its parent is on the kept domains."""


@dataclass(frozen=True)
class Verification:
    """What a comparison of a sub-model with its parent found; `verification.json` is this.

    largest_logit_difference: absolute, over all positions and vocabulary ids of the kept domains' probe sequences;
    allowed_difference: None where weights were stored in another type. largest_logit: absolute, of the parent.
    domains_mixed: how many domains met in the batches, foreign ones included.
    different_tensors: names whose bytes are not the parent's (none are expected where the type is kept).
    experts_reached: sparse layer -> domain -> [experts that the probe reached, experts in the group].
    probe_losses: domain -> [parent's, sub-model's] mean loss in nats per token on the probe.
    """

    largest_logit_difference: float
    allowed_difference: float | None
    largest_logit: float
    sequences: dict[str, int]
    sequence_length: int
    batch_size: int
    domains_mixed: int
    tensors_compared: int
    different_tensors: tuple[str, ...]
    experts_reached: dict[str, dict[str, tuple[int, int]]]
    probe_losses: dict[str, tuple[float, float]]
    device: str
    precision: str
    parent_sha256: str

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def holds(self) -> bool:
        """Whether the sub-model is what was asked for."""
        difference = self.largest_logit_difference
        if not np.isfinite(difference):
            return False
        if self.allowed_difference is None:
            return True
        return not self.different_tensors and difference <= self.allowed_difference

    def line(self) -> str:
        """The finding in one line."""
        count = sum(self.sequences.values())
        mixed = f" in batches that mix {self.domains_mixed} domains" if self.domains_mixed > 1 else ""
        weights = f"{self.tensors_compared - len(self.different_tensors)} of {self.tensors_compared} tensors identical"
        difference = self.largest_logit_difference
        shown = "0.0" if difference == 0 else f"{difference:.3g}"
        return f"largest logit difference {shown} over {count} probe sequences{mixed}; {weights}"


@COMPUTING
def verify(
    parent: Checkpoint,
    sub: Checkpoint,
    cut: ExtractionPlan,
    *,
    device: str = "CPU",
    advance: Callable[[int], None] | None = None,
) -> Verification:
    """Compare `sub`, which `cut` made or should have made, with `parent`, in float32 on `device`.

    `advance(1)` is called after each batch. Raises UserError if the checkpoint has no probe sequences of a kept domain,
    and for a damaged file of either folder.
    """
    probe = parent.probe()
    missing = [domain for domain in cut.domains if domain not in probe]
    if missing:
        raise UserError(
            f"{parent.path} holds no probe sequences of domain {missing[0]} (checkpoint.probe_sequences is 0), so "
            f"nothing can be verified: use {argument('verify', False)}"
        )
    compared, different = compare_tensors(parent, sub, cut)
    full, small = trained_from(parent, device, "float32"), trained_from(sub, device, "float32")
    batches = mixed_batches(probe, cut.domains)
    ours, theirs = _logits_of(small, cut.domains), _logits_of(full, parent.domains)
    largest, difference = 0.0, 0.0
    losses: dict[str, list[tuple[float, float]]] = {domain: [] for domain in cut.domains}
    for tokens, owners, counted in batches:
        stand_ins = [owner if owner in cut.domains else cut.domains[0] for owner in owners]
        before, after = theirs(tokens, owners), ours(tokens, stand_ins)
        for row in np.flatnonzero(counted):
            # A maximum would pass over a NaN that only one side has.
            row_difference = np.abs(before[row] - after[row]).max()
            difference = float(np.maximum(difference, row_difference))
            largest = max(largest, float(np.abs(before[row]).max()))
            labels = tokens[row, 1:]
            losses[owners[row]].append((_loss(before[row], labels, full), _loss(after[row], labels, full)))
        if advance is not None:
            advance(1)
    allowed: float | None = 0.0
    if cut.fold:
        allowed = FOLD_TOLERANCE * max(1.0, largest)
    if cut.converts:
        allowed = None
    return Verification(
        largest_logit_difference=difference,
        allowed_difference=allowed,
        largest_logit=largest,
        sequences={domain: len(by_sequence) for domain, by_sequence in losses.items()},
        sequence_length=full.model.config.data.sequence_length,
        batch_size=BATCH,
        domains_mixed=len({owner for _, owners, _ in batches for owner in owners}),
        tensors_compared=compared,
        different_tensors=tuple(different),
        experts_reached=_experts_reached(full, probe, cut.domains),
        probe_losses={domain: tuple(np.mean(by_sequence, axis=0).tolist()) for domain, by_sequence in losses.items()},
        device=device,
        precision="float32",
        parent_sha256=parent.sha256,
    )


def raise_if_different(verification: Verification) -> None:
    """Raises VerificationError unless the sub-model is what was asked for."""
    if verification.holds:
        return
    named = listed(verification.different_tensors, 3)
    raise VerificationError(
        "the sub-model is not the same function: the largest logit difference is "
        f"{verification.largest_logit_difference:g} where {verification.allowed_difference or 0.0:g} is allowed"
        + (
            f", and {len(verification.different_tensors)} tensors differ ({named})"
            if verification.different_tensors
            else ""
        )
        + "; nothing was kept: check the memory and the disk of this machine and cut again"
    )


def compare_tensors(parent: Checkpoint, sub: Checkpoint, cut: ExtractionPlan) -> tuple[int, list[str]]:
    """(tensors compared, names of those of `sub` whose bytes are not the parent's); other types are left out.

    Compared by the manifests' hashes, which hold for what is loaded, since loading checks them.
    """
    different = sorted(set(cut.sources) ^ set(sub.names(optimizer=False)))
    compared = len(different)
    for name, source in cut.sources.items():
        if name in different:
            continue
        entry, parent_entry = sub.manifest.tensors[name], parent.manifest.tensors[source]
        if entry.dtype != parent_entry.dtype and parent_entry.dtype in FLOAT_TYPES:
            continue
        compared += 1
        hashes = [piece.sha256 for piece in entry.slices], [piece.sha256 for piece in parent_entry.slices]
        if len(hashes[0]) == len(hashes[1]):
            same = hashes[0] == hashes[1]
        else:
            same = all(a == b for a, b in zip(sub.byte_chunks(name), parent.byte_chunks(source), strict=True))
        if not same:
            different.append(name)
    return compared, different


def mixed_batches(probe: dict[str, np.ndarray], kept: Sequence[str]) -> list[tuple[np.ndarray, list[str], np.ndarray]]:
    """Batches (tokens int32 [B, S + 1], domain of each row, whether the row counts) that hold every kept sequence once.

    Kept and foreign domains' rows alternate where there are foreign ones; what fills a last batch up does not count.
    """
    sequences = [(domain, sequence) for domain in kept for sequence in probe[domain]]
    foreign = [(domain, sequence) for domain, rows in probe.items() if domain not in kept for sequence in rows]
    # Neighbours of a batch should be of many domains, not all of the first.
    foreign = [foreign[i] for i in np.argsort([_rank(foreign, i) for i in range(len(foreign))], kind="stable")]
    each = BATCH // 2 if foreign else BATCH
    batches = []
    for number, start in enumerate(range(0, len(sequences), each)):
        own = sequences[start : start + each]
        rows = [own[i % len(own)] for i in range(each)]
        counted = [i < len(own) for i in range(each)]
        if foreign:
            others = [foreign[(number * each + i) % len(foreign)] for i in range(BATCH - each)]
            rows = [row for pair in zip(rows, others, strict=True) for row in pair]
            counted = [flag for is_own in counted for flag in (is_own, False)]
        batches.append((np.stack([tokens for _, tokens in rows]), [domain for domain, _ in rows], np.array(counted)))
    return batches


def _rank(rows: Sequence[tuple[str, np.ndarray]], index: int) -> int:
    """How many rows of the same domain come before."""
    return sum(rows[i][0] == rows[index][0] for i in range(index))


def _logits_of(trained: TrainedModel, domains: Sequence[str]) -> Callable[[np.ndarray, Sequence[str]], np.ndarray]:
    """(tokens int32 [B, S + 1], domain of each row) -> logits float32 [B, S, V]; batches may mix all `domains`."""
    from pangu_sigma.model.scoring import Scorer

    scorer = Scorer(trained.model, BATCH, domains=min(BATCH, len(domains)))
    numbers = {domain: number for number, domain in enumerate(domains)}
    return lambda tokens, owners: scorer.logits(tokens, [numbers[owner] for owner in owners]).asnumpy()


def _loss(logits: np.ndarray, labels: np.ndarray, trained: TrainedModel) -> float:
    """Mean cross-entropy in nats of one sequence, float64; padding at its end does not count."""
    real = np.flatnonzero(labels != trained.tokenizer.pad_id)
    count = real[-1] + 1 if real.size else labels.size
    rows = logits[:count].astype(np.float64)
    top = rows.max(axis=1)
    normaliser = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
    return float((normaliser - rows[np.arange(count), labels[:count]]).mean())


def _experts_reached(
    trained: TrainedModel, probe: dict[str, np.ndarray], domains: Sequence[str]
) -> dict[str, dict[str, tuple[int, int]]]:
    groups = trained.model.groups
    sizes = dict(zip(groups.names, groups.sizes, strict=True))
    return {
        layer_name: {d: (len(np.unique(tables[d][probe[d][:, :-1]])), sizes[d]) for d in domains}
        for layer_name, tables in trained.model.tables.items()
    }
