"""The filter on system calls: a BPF program that refuses what no graded program needs.

A list of refusals, not of permissions: toolchains of four languages run under it. The refused calls are those that
reach other processes, other namespaces, the network, kernel keys, shared memory that outlives a process, and the parts
of the kernel with a history of faults. Refusals are errors (the program goes on); another architecture's calls kill.
"""

import ctypes
import errno
import functools
import struct

from posttrain.sandbox import kernel

# number on x86_64, number on aarch64; None where the call does not exist.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "mknod": (133, None),
    "mknodat": (259, 33),
    # network: there is no socket but a pair
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # objects that outlive a process
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    # wide kernel surface
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "lookup_dcookie": (212, 18),
    "memfd_secret": (447, 447),
    # the machine itself
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "syslog": (103, 116),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "nfsservctl": (180, 42),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
}
CLONE, CLONE3, PRLIMIT64, IOCTL, SOCKETPAIR = (56, 220), (435, 435), (302, 261), (16, 29), (53, 199)
FORK, VFORK = (57, None), (58, None)
NEW_NAMESPACES = (
    kernel.CLONE_NEWNS
    | kernel.CLONE_NEWCGROUP
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
)
TERMINAL_IOCTLS = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX: they type into a terminal."""

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_LOAD, _AND, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _refuse(number: int, code: int) -> list[bytes]:
    return [_op(_JEQ, number, 0, 1), _op(_RETURN, _ERROR | code)]


def _refuse_if(number: int, argument: int, test: bytes) -> list[bytes]:
    """Refuse the call where `test`, a jump of one over the refusal, does not jump."""
    return [
        _op(_JEQ, number, 0, 4),
        _op(_LOAD, argument),
        test,
        _op(_RETURN, _ERROR | errno.EPERM),
        _op(_RETURN, _ALLOW),
    ]


def _refuse_pairs(number: int) -> list[bytes]:
    """All socket pairs but connected streams of this machine: a datagram can be sent to any address, pair or not."""
    refuse, allow = _op(_RETURN, _ERROR | errno.EPERM), _op(_RETURN, _ALLOW)
    return [
        _op(_JEQ, number, 0, 8),
        _op(_LOAD, _ARGUMENT_0),
        _op(_JEQ, 1, 0, 4),  # AF_UNIX
        _op(_LOAD, _ARGUMENT_1),
        _op(_AND, 0xF),
        _op(_JEQ, 1, 2, 0),  # SOCK_STREAM
        _op(_JEQ, 5, 1, 0),  # SOCK_SEQPACKET
        refuse,
        allow,
    ]


@functools.cache
def program(processes: bool) -> bytes:
    """The filter for this machine; without `processes` there is no new process and no thread either."""
    machine = kernel.machine()
    column = kernel.MACHINES.index(machine)
    code = [
        _op(_LOAD, _ARCH),
        _op(_JEQ, _AUDIT_ARCH[machine], 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        code += [_op(_JGE, _X32, 0, 1), _op(_RETURN, _KILL)]
    for numbers in REFUSED.values():
        number = numbers[column]
        if number is not None:
            code += _refuse(number, errno.EPERM)
    # Its flags lie in memory, where a filter cannot look; the C library falls back to clone.
    code += _refuse(CLONE3[column], errno.ENOSYS)
    if processes:
        code += _refuse_if(CLONE[column], _ARGUMENT_0, _op(_JSET, NEW_NAMESPACES, 0, 1))
    else:
        for numbers in (CLONE, FORK, VFORK):
            number = numbers[column]
            if number is not None:
                code += _refuse(number, errno.EAGAIN)
    # Limits of another process with the same user.
    code += _refuse_if(PRLIMIT64[column], _ARGUMENT_0, _op(_JEQ, 0, 1, 0))
    code += _refuse_pairs(SOCKETPAIR[column])
    for request in TERMINAL_IOCTLS:
        code += [
            _op(_JEQ, IOCTL[column], 0, 3),
            _op(_LOAD, _ARGUMENT_1),
            _op(_JEQ, request, 0, 1),
            _op(_RETURN, _ERROR | errno.EPERM),
            _op(_LOAD, _NUMBER),
        ]
    return b"".join([*code, _op(_RETURN, _ALLOW)])


def install(code: bytes) -> None:
    """For this process and all it starts, for good. No-new-privileges must be set."""
    buffer = ctypes.create_string_buffer(code, len(code))
    prog = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(prog, len(prog))
    kernel.prctl(22, 2, ctypes.addressof(holder))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
