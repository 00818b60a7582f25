"""Paths of a configuration: kept relative to the folder that keeps it, and the same wherever that folder is taken."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from pangu_sigma.config import load_config
from pangu_sigma.config.config_paths import stored_text, with_stored_paths
from pangu_sigma.config.config_text import yaml_text
from pangu_sigma.config.load_config import load_values, read_config, read_stored
from pangu_sigma.data.corpus_files import expand_paths
from pangu_sigma.errors import UserError


@pytest.fixture
def project(tmp_path, small_file, monkeypatch) -> Path:
    """A folder in which a run was configured from the folder itself, with paths of every kind."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    shutil.copy(small_file, folder / "small.yaml")
    monkeypatch.chdir(folder)
    return folder


def configured(*overrides):
    own = ["domains.code.data=data/code.jsonl", "domains.docs.data=[../shared/*.txt, /data/corpora/x.jsonl]"]
    return load_config("small.yaml", [*own, "run.init_from=models/a/", *overrides])


def kept(config, folder: Path, **options) -> Path:
    """The file that the run or model in `folder` keeps."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(stored_text(config, folder, **options), encoding="utf-8")
    return file


def test_what_a_run_keeps_starts_at_its_folder(project):
    file = kept(configured("run.dir=./runs//orig/"), project / "runs/orig")
    values = yaml.safe_load(file.read_text())
    assert values["paths_from"] == "file" and values["run"]["dir"] == "." and values["data"]["cache"] == "data"
    assert values["run"]["init_from"] == "../../models/a"
    assert values["domains"][0]["data"] == ["../../data/code.jsonl"]
    # Nothing that is moved with the run has anything to do with the second.
    assert values["domains"][1]["data"] == ["../../../shared/*.txt", "/data/corpora/x.jsonl"]


def test_it_is_read_from_any_folder_as_what_it_was(project, monkeypatch, tmp_path):
    config = configured("run.dir=runs/orig")
    file = kept(config, project / "runs/orig")
    for place, name in (("/", file), (project / "data", "../runs/orig/config.yaml"), (file.parent, "config.yaml")):
        monkeypatch.chdir(place)
        assert load_config(name) == config


@pytest.mark.parametrize("move", ["runs/branch", "runs/deep/er", "../elsewhere"])
def test_a_copied_run_is_itself(project, move):
    config = configured("run.dir=runs/orig")
    file = kept(config, project / "runs/orig")
    copy = Path(shutil.copytree(file.parent, project / move)).resolve()
    loaded = load_config(copy / "config.yaml")
    assert loaded.run.dir == str(copy) and loaded.data.cache == str(copy / "data")
    if move == "runs/branch":
        assert loaded.domains == config.domains and loaded.run.init_from == config.run.init_from


def test_a_moved_tree_takes_its_text_along(project, monkeypatch, tmp_path):
    kept(configured("run.dir=runs/orig", f"data.cache={project}/cache"), project / "runs/orig")
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "moved")
    loaded = load_config(tmp_path / "moved/runs/orig/config.yaml")
    assert loaded.domains[0].data == (str(tmp_path / "moved/data/code.jsonl"),)
    assert loaded.data.cache == str(tmp_path / "moved/cache") and loaded.run.dir == str(tmp_path / "moved/runs/orig")


def test_links_lead_to_the_same_folder(project, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (project / "runs").symlink_to(tmp_path / "disk")
    (project / "data/linked.jsonl").symlink_to(tmp_path / "blob")
    config = configured("run.dir=runs/orig", "domains.code.data=data/linked.jsonl")
    file = kept(config, project / "runs/orig")
    os.symlink(tmp_path / "disk/orig", tmp_path / "other")
    os.symlink(file, tmp_path / "run.yaml")
    for name in (file, tmp_path / "other/config.yaml", tmp_path / "run.yaml"):
        loaded = load_config(name)
        assert loaded.run.dir == str(tmp_path / "disk/orig")
        assert loaded.domains[0].data == (str(project / "data/linked.jsonl"),)  # by its own name


def test_a_checkpoints_configuration_is_its_runs_and_a_copy_of_it_a_models(project):
    run = project / "runs/orig"
    text = kept(configured("run.dir=runs/orig"), run).read_text()
    for folder, expected in ((run / "checkpoints/step-00000008", run), (project / "taken", project / "taken")):
        folder.mkdir(parents=True)
        config = read_stored(text, folder / "config.yaml")
        assert (config.run.dir, config.data.cache) == (str(expected), str(expected / "data"))


def test_a_models_configuration_holds_no_absolute_path(project):
    values = kept(configured("run.dir=runs/orig"), project / "models/b", is_model=True).read_text()
    assert str(project) not in values and ": /" not in values and "- /" not in values
    loaded = load_config(project / "models/b/config.yaml", ["run.dir=new"])
    assert loaded.run.dir == str(project / "new") and loaded.data.cache == str(project / "runs/orig/data")
    assert loaded.domains == configured().domains


def test_patterns_below_a_folder_with_brackets_find_their_files_from_wherever_the_run_is_taken(project, tmp_path):
    """What lies above a pattern is meant as it is written, also where a moved folder brings the brackets."""
    names = [f"data/part-{n}/{kind}.jsonl" for n in "12" for kind in ("a", "b")]
    for name in names:
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text('{"text": "x"}\n')
    kept(configured("run.dir=runs/a[b]", "domains.code.data=data/part-[0-9]/[!b].jsonl"), project / "runs/a[b]")
    for folder in ("moved [a-z]", "[x]/y[!z]*"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        project = project.rename(tmp_path / folder)
        loaded = load_config(project / "runs/a[b]/config.yaml")
        assert loaded.run.dir == str(project / "runs/a[b]") and loaded.data.cache == str(project / "runs/a[b]/data")
        assert expand_paths("code", loaded.domains[0].data) == [project / names[0], project / names[2]]
        # Stored again, as a run that goes on does.
        kept(loaded, project / "runs/a[b]")


def test_a_cache_in_the_runs_folder_is_written_and_follows_another_run_dir(project):
    own = kept(configured("run.dir=runs/orig"), project / "runs/orig")
    values = read_config(own)
    marked = yaml_text(load_values(values, str(own)), 100, values)
    assert f"  cache: {project}/runs/orig/data" in marked.splitlines()  # and no mark behind it
    for overrides, cache in (
        (["run.dir=new"], "new/data"),
        (["run.dir=runs/orig"], "runs/orig/data"),
        (["run.dir=new", "data.cache=there"], "there"),
        (["run.dir=new", f"data.cache={project}/runs/orig/data"], "runs/orig/data"),
    ):
        for source in (own, load_config(own)):
            assert load_config(source, overrides).data.cache == str(project / cache)


def test_what_is_typed_starts_at_the_current_folder(project, monkeypatch):
    file = kept(configured("run.dir=runs/orig"), project / "runs/orig")
    monkeypatch.chdir(project / "data")
    loaded = load_config(file, ["run.dir=new", "domains.docs.data=x.txt", ("run.init_from", "m")])
    assert loaded.run.dir == str(project / "data/new") and loaded.run.init_from == str(project / "data/m")
    assert loaded.domains[1].data == (str(project / "data/x.txt"),)
    assert loaded.domains[0].data == (str(project / "data/code.jsonl"),)
    assert loaded.data.cache == str(project / "data/new/data")  # a new run tokenises into its own folder


def test_a_file_by_hand_may_hold_its_own_paths(project, monkeypatch):
    text = Path("small.yaml").read_text().replace("run:", "paths_from: file\nrun:")
    (project / "data/own.yaml").write_text(text)
    monkeypatch.chdir("/")
    loaded = load_config(project / "data/own.yaml")
    assert loaded.run.dir == str(project / "data/runs/small") and loaded.paths_from == "current_folder"
    assert loaded.domains[0].data == (str(project / "data/code.jsonl"),)
    for refused in ({"paths_from": "file"}, ["paths_from=file"]):
        with pytest.raises(UserError, match="paths_from = file says where the paths of a file start"):
            load_config(project / "small.yaml", refused)


def test_a_folder_of_an_earlier_version_is_itself_where_it_is_now(project):
    """It holds absolute paths and no `paths_from`."""
    config = configured("run.dir=runs/orig")
    run = project / "runs/orig"
    (run / "checkpoints/step-00000008").mkdir(parents=True)
    (run / "config.yaml").write_text(config.to_yaml())
    assert load_config(run / "config.yaml") == config
    copy = shutil.copytree(run, project / "deep/er/branch")
    loaded = load_config(copy / "config.yaml")
    assert loaded.run.dir == str(copy) and loaded.data.cache == str(copy / "data")
    assert loaded.domains == config.domains
    # A user's own file beside a folder of that name says where its run lies.
    (project / "checkpoints/mine").mkdir(parents=True)
    (project / "config.yaml").write_text(config.to_yaml())
    assert load_config(project / "config.yaml") == config


def test_a_stream_from_standard_input_is_no_path(project):
    stream = {"data.stream": {"path": "-", "domain": "code"}}
    config = load_config("small.yaml", {**stream, "train.phases": []})
    assert load_config(kept(config, project / "runs/small")).data.stream.path == "-"


def test_sentences_of_a_run_start_at_its_folder(tmp_path):
    run = tmp_path / "runs/orig"
    run.mkdir(parents=True)
    for sentence, stored in (
        (f"saved {run}/checkpoints/step-1", "saved checkpoints/step-1"),
        (f"{run}: begun; resume with {run}.", "./: begun; resume with ./."),
        (f"begins with {tmp_path}/models/b (step 2)", "begins with ../../models/b (step 2)"),
        (f"{run}-2/x and {run}.old", "../orig-2/x and ../orig.old"),
        ("read /dev/null, a/b and http://host/runs", "read /dev/null, a/b and http://host/runs"),
    ):
        assert with_stored_paths(sentence, run) == stored
