"""The extraction benchmark: its figures, and a small round of it with real processes."""

from pathlib import Path

from benchmarks.extraction import benchmark_config, make_checkpoint, measure, measured_process, summary, table
from pangu_sigma.domains.list_domains import list_files


def test_ratios_are_taken_inside_a_round_and_imports_are_no_bytes_of_the_model():
    def found(extract, cp, both):
        figures = {"seconds": extract, "read": 1100, "written": 1000, "memory": 5e7, "output": 1000}
        return {"extract": figures, "cp": {"seconds": cp}, "cp and sync": {"seconds": both}}

    rounds = [found(3.0, 1.0, 2.0), found(8.0, 2.0, 4.0), found(3.0, 3.0, 6.0)]
    result = {"domains": 1, "rounds": rounds, **summary({"rounds": rounds}, {"read": 90})}
    assert result["ratios"] == {"cp": 3.0, "cp and sync": 1.5} and result["read_per_written"] == 1.01
    assert "| 1 | 0.00 GB | 1.010 | 50 MB | 3.00 s | 4.00 s | 2.00 s | **1.50** | 3.00 |" in table([result])


def test_one_domain_costs_its_own_bytes_and_no_others(tmp_path: Path):
    parent = make_checkpoint(tmp_path / "checkpoint", benchmark_config(domains=6, ffn=64))
    assert len(list_files(parent.path)) == 6
    (tmp_path / "work").mkdir()
    imports = measured_process(tmp_path / "work")
    result = summary(measure(parent, 2, tmp_path / "work", rounds=1), imports)
    assert result["read_per_written"] < 1.02 and imports["read"] < 50e6
    assert result["memory"] < imports["memory"] + 64e6
    assert not (tmp_path / "work" / "out").exists()
