"""The parts of the sandbox whose faults would not show: the filter's program, chosen levels, mirrors, places."""

import os
import struct
from pathlib import Path

import pytest

from posttrain.errors import InputError, MachineError
from posttrain.sandbox import kernel, level, mirror, seccomp, session
from posttrain.sandbox.confine import DROPPED_USER, NAMESPACES

ALLOW, KILL, REFUSE, AGAIN, NO_SUCH = 0x7FFF0000, 0x80000000, 0x50001, 0x5000B, 0x50026


def verdict(code: bytes, number: int, *arguments: int, architecture: int = 0xC000003E) -> int:
    """A second reading of the filter: the classic BPF machine, in Python."""
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("=iIQ6Q", number, architecture, 0, *padded)
    at, accumulator = 0, 0
    while True:
        code_, if_true, if_false, value = struct.unpack_from("=HBBI", code, 8 * at)
        at += 1
        if code_ == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif code_ == 0x54:
            accumulator &= value
        elif code_ == 0x06:
            return int(value)
        else:
            truth = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code_]
            at += if_true if truth else if_false


@pytest.fixture
def filters(monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, bytes]:
    monkeypatch.setattr(kernel, "machine", lambda: "x86_64")
    return seccomp.program.__wrapped__(True), seccomp.program.__wrapped__(False)


def test_the_filter_refuses_what_it_lists_and_allows_the_rest(filters: tuple[bytes, bytes]) -> None:
    listed = {pair[0] for pair in seccomp.REFUSED.values()}
    special = {56, 57, 58, 435, 302, 16, 53}
    for code in filters:
        for number in range(470):
            if number not in special:
                assert verdict(code, number) == (REFUSE if number in listed else ALLOW), number


def test_the_filter_looks_at_arguments(filters: tuple[bytes, bytes]) -> None:
    with_processes, alone = filters
    assert verdict(with_processes, 56, 17) == ALLOW  # fork
    for flag in (0x20000, 0x10000000, 0x20000000, 0x40000000, 0x8000000, 0x4000000, 0x2000000):
        assert verdict(with_processes, 56, 17 | flag) == REFUSE
    assert [verdict(alone, number, 17) for number in (56, 57, 58)] == [AGAIN] * 3
    for code in filters:
        assert verdict(code, 435) == NO_SUCH
        assert (verdict(code, 302, 0), verdict(code, 302, 1)) == (ALLOW, REFUSE)
        assert (verdict(code, 16, 0, 0x5401), verdict(code, 16, 0, 0x5412)) == (ALLOW, REFUSE)
        kinds = {kind: verdict(code, 53, 1, kind | 0o2000000) for kind in (1, 2, 3, 5)}
        assert kinds == {1: ALLOW, 2: REFUSE, 3: REFUSE, 5: ALLOW}
        assert verdict(code, 53, 2, 1) == REFUSE


def test_other_architectures_are_ended(filters: tuple[bytes, bytes]) -> None:
    assert verdict(filters[0], 0, architecture=0x40000003) == KILL
    assert verdict(filters[0], 0x40000000 | 41) == KILL


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(InputError, match="no sandbox level 'docker'; levels: auto, namespaces"):
        level.use("docker")


@pytest.mark.parametrize("name", ["/x", "../x", "a/../x", "a//b", "", ".", "a/.", "x" * 5000])
def test_names_stay_inside(name: str) -> None:
    with pytest.raises(ValueError, match="no path inside"):
        session._parts(name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root has a user to drop to")
def test_a_private_folder_is_mirrored_for_the_dropped_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    home = tmp_path / "home"
    (home / "tool" / "bin").mkdir(parents=True)
    (home / "tool" / "bin" / "run").write_text("x")
    (home / "tool" / "private").write_text("x")
    (home / "tool" / "private").chmod(0o600)
    home.chmod(0o700)
    assert mirror.readable(str(home / "tool"), NAMESPACES) == str(home / "tool")
    made = Path(mirror.readable(str(home / "tool"), DROPPED_USER))
    assert made != home / "tool" and os.listdir(made / "bin") == ["run"] and not (made / "private").exists()
    assert mirror.readable(str(home / "tool"), DROPPED_USER) == str(made)
    made.chmod(0o777)
    with pytest.raises(MachineError, match="that only we can write"):
        mirror.readable(str(home / "tool"), DROPPED_USER)
