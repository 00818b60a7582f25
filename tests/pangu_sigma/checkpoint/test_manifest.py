"""A manifest whose own hash is right, but which describes no whole checkpoint, is refused all the same."""

import hashlib

import numpy as np
import pytest

from pangu_sigma.checkpoint import CheckpointError, open_checkpoint
from pangu_sigma.checkpoint.tensor_file import digest_of, make_header, raw_bytes, spec_of

WORD = "embedding.word"
UP = "domains.law.blocks.2.experts.up.weight"


def move_file(fields: dict, path: str) -> None:
    fields["files"][path] = fields["files"].pop("domains/law.safetensors")
    for entry in fields["tensors"].values():
        for piece in entry["slices"]:
            if piece["file"] == "domains/law.safetensors":
                piece["file"] = path


CHANGES = {
    "a newer format": (lambda m: m.update(format_version=2), "format version 2"),
    "another format": (lambda m: m.update(format_version="1"), "format_version"),
    "an unknown field": (lambda m: m.update(extra=1), "extra"),
    "a lost field": (lambda m: m.pop("coverage"), "coverage"),
    "a negative size": (lambda m: m["files"]["state.json"].update(bytes=-1), "files.state.json.bytes"),
    "a number as text": (lambda m: m.update(step="7"), "step"),
    "no state": (lambda m: m["files"].pop("state.json"), "state.json is not listed"),
    "an absolute path": (lambda m: move_file(m, "/etc/domains/law.safetensors"), "may leave"),
    "a path upwards": (lambda m: move_file(m, "../domains/law.safetensors"), "may leave"),
    "a hidden path upwards": (lambda m: move_file(m, "domains/x/../law.safetensors"), "may leave"),
    "a backslash": (lambda m: move_file(m, "domains\\law.safetensors"), "may leave"),
    "another domain's file": (lambda m: move_file(m, "domains/code2.safetensors"), "not a file of its group"),
    "a lost file entry": (lambda m: m["files"].pop("domains/law.safetensors"), "not a file of its group"),
    "another shape": (lambda m: m["tensors"][WORD].update(shape=[50, 9]), "do not fill"),
    "a slice outside": (lambda m: m["tensors"][WORD]["slices"][0].update(offset=[1, 0]), "outside"),
    "a slice twice": (lambda m: m["tensors"][WORD].update(slices=m["tensors"][WORD]["slices"] * 2), "two slices"),
    "another type": (lambda m: m["tensors"][WORD].update(dtype="float16"), "its tensors and header need"),
    "an unknown type": (lambda m: m["tensors"][WORD].update(dtype="float99"), "float99"),
    "a lost shared tensor": (lambda m: m["tensors"].pop(WORD), "its tensors and header need"),
    "a lost expert tensor": (lambda m: m["tensors"].pop(UP), "its tensors and header need"),
    "another group size": (lambda m: m["coverage"][1].update(experts=3), "has 3 experts"),
    "a lost group": (lambda m: m["coverage"].pop(1), "no expert group of domain law"),
    "a group twice": (lambda m: m["coverage"].append(m["coverage"][0]), "covered twice"),
    "a lost kind of tensor": (lambda m: m["coverage"][1]["tensors"].remove("routing"), "other kinds of tensors"),
    "an unknown domain": (lambda m: m.update(domains=["code", "law", "math"]), "domain math"),
    "a lost domain": (lambda m: m.update(domains=["code"]), "no domain of the checkpoint"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_manifest_that_is_not_whole_is_refused(folder, edit_manifest, what):
    change, message = CHANGES[what]
    edit_manifest(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder / "manifest.json") in str(caught.value)


def test_an_edit_without_the_hash_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    with pytest.raises(CheckpointError, match=r"manifest.json was altered or is cut off"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100000, b"\xff\xfe", b'{"format_version": 1}'])
def test_anything_else_in_the_manifests_place_is_refused(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest.json"):
        open_checkpoint(folder)


def test_a_shape_that_the_file_does_not_hold_is_refused_on_reading(folder, edit_manifest):
    def swap(manifest):
        manifest["tensors"][WORD]["shape"] = manifest["tensors"][WORD]["slices"][0]["shape"] = [8, 50]

    edit_manifest(folder, swap)
    with pytest.raises(CheckpointError, match=r"shared.safetensors is damaged: tensor 'embedding.word'"):
        open_checkpoint(folder).load([WORD])


def test_slices_of_several_writers_make_one_tensor(folder, tensors, edit_manifest):
    """As several processes will write them: each a file with its part of a tensor, cut along any axis."""
    name = "domains.law.blocks.2.experts.up.weight"
    full = tensors[name]
    others = {key: array for key, array in tensors.items() if key.startswith("domains.law.") and key != name}
    others = {key: array for key, array in others.items() if ".optimizer." not in key}
    parts = [
        ("domains/law-00001-of-00002.safetensors", (0, 0, 0), full[:, :, :5], others),
        ("domains/law-00002-of-00002.safetensors", (0, 0, 5), full[:, :, 5:], {}),
    ]

    def replace(manifest):
        del manifest["files"]["domains/law.safetensors"]
        manifest["tensors"][name]["slices"] = []
        for path, offset, part, more in parts:
            contents = {name: part, **more}
            specs = sorted((spec_of(key, array) for key, array in contents.items()), key=lambda spec: spec.name)
            header = make_header(specs)
            content = header + b"".join(bytes(raw_bytes(contents[spec.name])) for spec in specs)
            (folder / path).write_bytes(content)
            manifest["files"][path] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "header_bytes": len(header),
                "header_sha256": hashlib.sha256(header).hexdigest(),
            }
            for key in more:
                manifest["tensors"][key]["slices"][0]["file"] = path
            piece = {"file": path, "offset": offset, "shape": part.shape, "sha256": digest_of(part)}
            manifest["tensors"][name]["slices"].append(piece)

    edit_manifest(folder, replace)
    checkpoint = open_checkpoint(folder)
    loaded = checkpoint.load()
    assert all(np.array_equal(loaded[key], array) for key, array in tensors.items())
    edit_manifest(folder, lambda manifest: manifest["tensors"][name]["slices"][1].update(offset=(0, 0, 4)))
    with pytest.raises(CheckpointError, match="do not fill it exactly once"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("domains.law.query_layer.routing"), "other kinds of tensors"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("domains.law.query_layer")], "no tensors in sparse"),
        (lambda t: t.update({UP: t[UP][:1]}), "has 2 experts"),
        (lambda t: t.update({"domains.law.blocks.1.routing": np.zeros(50, np.int32)}), "not name layer 'blocks.1'"),
        (lambda t: t.update({"domains.art.x": np.zeros(5, np.int32)}), "not among the domains"),
        (lambda t: t.update({"probe.law": np.zeros(5, np.int32)}), "reserved"),
    ],
)
def test_tensors_that_leave_a_gap_are_not_saved(tmp_path, tensors, save, change, message):
    change(tensors)
    with pytest.raises(ValueError, match=message):
        save(tmp_path, 1, tensors)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("names", [["a.b"], ["../a"], [""], ["-a"], ["Code", "code"], ["a-00001-of-00002"], ["a/b"]])
def test_domain_names_that_are_no_file_names_are_refused(tmp_path, save, names):
    with pytest.raises(ValueError, match="domain name"):
        save(tmp_path, 1, {}, groups={}, domains=names)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a\\b"])
def test_tokenizer_files_stay_in_their_folder(tmp_path, save, name):
    with pytest.raises(ValueError, match="plain file name"):
        save(tmp_path, 1, {}, groups={}, tokenizer_files={name: b""})
