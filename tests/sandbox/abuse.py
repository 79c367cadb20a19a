"""Programs that misuse the machine or try to leave the sandbox, by the names of the list that they come from.

`{token}` is the secret that must not come out, and the name of whatever a program tries to leave behind; `{...}` places
are the test's. A program that got where it must not prints `ESCAPED`.
"""

PRELUDE = """\
import ctypes, os, signal, socket, subprocess, sys, threading, time
def attempt(act, *more):
    try:
        found = act(*more)
    except BaseException as fault:
        print(type(fault).__name__)
        return None
    print(found)
    return found
def read(path):
    with open(path, "rb") as file: return file.read()
def escape(act, *more):
    try:
        act(*more)
    except BaseException as fault:
        print(type(fault).__name__)
    else:
        print("ESCAPED")
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    if libc.syscall(number, *arguments) < 0: raise OSError(ctypes.get_errno(), "refused")
"""

RESOURCES = {
    "fork bomb": """\
while True:
    try: os.fork()
    except OSError: pass
""",
    "thread bomb": """\
while True:
    try: threading.Thread(target=time.sleep, args=(60,)).start()
    except RuntimeError: pass
""",
    "pipe bomb": """\
kept = []
while True:
    try:
        ends = os.pipe(); kept.append(ends)
        os.set_blocking(ends[1], False)
        while True: os.write(ends[1], bytes(65536))
    except OSError: pass
""",
    "memory in one process": """\
kept = []
while True: kept.append(bytearray(b'x' * 2**24))
""",
    "memory in many": """\
for _ in range(6): os.fork()
kept = []
while True: kept.append(bytearray(b'x' * 2**22))
""",
    "memory in a memory file": """\
f = os.memfd_create('x')
while True: os.write(f, b'x' * 2**20)
""",
    "one big file": """\
f = open('big', 'wb')
while True: f.write(b'x' * 2**20)
""",
    "many big files": """\
n = 0
while True:
    n += 1
    open(f'big{n}', 'wb').write(b'x' * 2**20)
""",
    "deleted big files": """\
kept = []
while True:
    f = open('big', 'wb'); os.unlink('big'); kept.append(f); f.write(b'x' * 2**20); f.flush()
""",
    "many files": """\
n = 0
while True:
    n += 1
    open(f'f{n}', 'w').close()
""",
    "sparse file": "os.truncate(os.open('sparse', os.O_CREAT | os.O_RDWR), 2**40)\n",
    "inodes": """\
n = 0
while True:
    n += 1
    os.mkdir(f'd{n}')
    os.symlink('x', f'd{n}/l')
""",
    "deep folders": """\
while True:
    os.mkdir('d'); os.chdir('d')
""",
    "log flood": "while True: os.write(1, b'x' * 65536)\n",
    "CPU loop": "while True: pass\n",
    "sleep": "time.sleep(1000)\n",
    "ignored signals": """\
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)
""",
    "stopped process": """\
os.kill(os.getpid(), signal.SIGSTOP)
while True: time.sleep(1)
""",
    "daemon": """\
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        [os.close(n) for n in (0, 1, 2)]
        time.sleep(1000)
    os._exit(0)
""",
    "zombie": """\
for _ in range(5):
    if os.fork() == 0: os._exit(0)
time.sleep(0.3)
""",
    "setsid": """\
if os.fork() == 0:
    os.setsid(); time.sleep(1000)
""",
    "deep recursion": """\
sys.setrecursionlimit(10**9)
def f(): f()
f()
""",
    "regex blow-up": """\
import re
re.match('(a|a)*b', 'a' * 64)
""",
    "segfault": "ctypes.string_at(0)\n",
    "compile blow-up": "compile('(' * 90 + '1' + ')' * 90 + '+' + '[' * 50 + '1,' * 10**7 + ']' * 50, 'x', 'eval')\n",
}

ISOLATION = {
    "own environment": "print(dict(os.environ))\n",
    "/proc/*/environ": """\
for pid in range(1, 5000):
    try: print(read(f'/proc/{pid}/environ'))
    except OSError: pass
""",
    "process 1's environ": """\
attempt(read, '/proc/1/environ')
attempt(read, '/proc/1/cmdline')
attempt(os.listdir, '/proc/1/fd')
""",
    "the parent's environ": """\
attempt(read, '/proc/{parent}/environ')
attempt(read, '/proc/{parent}/mem')
attempt(read, f'/proc/{os.getppid()}/environ')
""",
    "token files": """\
attempt(read, '{folder}/secret')
attempt(read, os.path.expanduser('~/.cache/huggingface/token'))
""",
    "other slots": """\
import glob
for path in glob.glob('{temporary}/posttrain-*/**', recursive=True):
    attempt(read, path)
attempt(read, '{other}/secret')
""",
    "run folder": """\
for top in ('/', '{temporary}', '/root', '/home', '{folder}'):
    for path, _, names in os.walk(top):
        if path.count('/') > 4 or path.startswith(('/usr', '/proc', '/sys')): continue
        for name in names:
            if name == 'secret': attempt(read, path + '/' + name)
""",
    "answers": """\
attempt(os.read, 3, 1)
attempt(os.read, 4, 100)
attempt(read, '/proc/self/fd/3') if False else None
""",
    "symlink": """\
os.symlink('{folder}/secret', 'link')
attempt(read, 'link')
os.symlink('{folder}', 'way')
attempt(read, 'way/secret')
""",
    "hard link": """\
escape(os.link, '{folder}/secret', 'hard')
attempt(read, 'hard')
""",
    "..": """\
attempt(read, '../' * 20 + '{folder}/secret'.lstrip('/'))
attempt(os.listdir, '../../..')
""",
    "TCP": """\
def go():
    s = socket.socket(); s.settimeout(1); s.connect(('127.0.0.1', {tcp})); s.send(b'{token}')
escape(go)
""",
    "UDP": """\
def go():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'{token}', ('127.0.0.1', {udp}))
escape(go)
""",
    "DNS": """\
socket.setdefaulttimeout(1)
escape(socket.getaddrinfo, '{token}.invalid', 80)
""",
    "unix socket": """\
def go():
    s = socket.socket(socket.AF_UNIX); s.connect('{unix}'); s.send(b'{token}')
escape(go)
""",
    "abstract socket": r"""def go():
    s = socket.socket(socket.AF_UNIX); s.connect(b'\0{abstract}'); s.send(b'{token}')
escape(go)
""",
    "socket pair sends elsewhere": r"""a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
escape(a.sendto, b'{token}', b'\0{abstract_datagram}')
escape(a.sendto, b'{token}', '{unix_datagram}')
""",
    "metadata address": """\
def go():
    s = socket.socket(); s.settimeout(1); s.connect(('169.254.169.254', 80))
escape(go)
""",
    "inherited descriptors": """\
for n in range(4, 1024):
    try: os.fstat(n)
    except OSError: continue
    print('ESCAPED', n)
""",
    "ptrace": """\
escape(syscall, {ptrace}, 16, {parent}, 0, 0)
escape(syscall, {ptrace}, 16, os.getppid(), 0, 0)
""",
    "killing the parent": """\
for pid in ({parent}, {worker}):
    escape(os.kill, pid, 9)
try: os.kill(os.getppid(), 9)
except OSError: pass
""",
    "kill all": """\
try: os.kill(-1, 9)
except OSError: pass
""",
    "signals at the worker": """\
for n in range(1, 32):
    try: os.kill(os.getppid(), n)
    except OSError: pass
""",
    "limits of the parent": """\
import resource
escape(resource.prlimit, {parent}, resource.RLIMIT_CORE)
escape(resource.prlimit, {worker}, resource.RLIMIT_NOFILE, (0, 0))
""",
    "user namespace": """\
escape(syscall, {unshare}, 0x10000000)
escape(syscall, {clone}, 0x10000000 | 17, 0, 0, 0, 0)
""",
    "mount": "escape(syscall, {mount}, b'tmpfs', b'/tmp', b'tmpfs', 0, None)\n",
    "chroot": "escape(os.chroot, '.')\n",
    "becoming root": """\
escape(os.setuid, 0)
escape(subprocess.check_call, ['su', '-c', 'true']) if os.getuid() else None
""",
    "io_uring": "escape(syscall, 425, 8, bytes(256))\n",
    "keys": "escape(syscall, {add_key}, b'user', b'{token}', b'x', 1, -3)\n",
    "device files": """\
escape(os.mknod, 'disk', 0o60600, os.makedev(254, 0))
for name in ('/dev/mem', '/dev/kmsg', '/dev/vda', '/dev/sda'):
    escape(open, name, 'rb')
""",
    "the kernel's switches": """\
escape(open, '/proc/sys/kernel/hostname', 'w')
escape(open, '/proc/sysrq-trigger', 'w')
escape(open, '/sys/kernel/uevent_helper', 'w')
""",
    "system files": """\
escape(open, '/usr/bin/{token}', 'w')
escape(open, '/etc/{token}', 'w')
escape(open, sys.executable, 'r+b')
""",
    "interpreter's files": """\
import json
escape(open, json.__file__, 'a')
escape(open, os.path.dirname(json.__file__) + '/{token}.py', 'w')
""",
    "left-over shared memory": """\
escape(syscall, {shmget}, 4242, 4096, 0o1666)
for place in ('/dev/shm', '/tmp', '/var/tmp', '/run/lock', '{open}'):
    try: open(place + '/{token}', 'w').close()
    except OSError: pass
""",
    "left-over message queue": "escape(syscall, {mq_open}, b'{token}', 0o102, 0o666, None)\n",
}

NUMBERS = {
    "x86_64": {"ptrace": 101, "unshare": 272, "clone": 56, "mount": 165, "add_key": 248, "shmget": 29, "mq_open": 240},
    "aarch64": {"ptrace": 117, "unshare": 97, "clone": 220, "mount": 40, "add_key": 217, "shmget": 194, "mq_open": 180},
}

HACKS = {
    "sys.exit(0)": """\
import sys
sys.exit(0)
""",
    "os._exit": """\
import os
os._exit(0)
""",
    "atexit": """\
import atexit, os
atexit.register(os._exit, 0)
def f(a): raise SystemExit(0)
""",
    "always-equal object": """\
class E:
    def __eq__(s, o): return True
    def __repr__(s): return '4'
    def __hash__(s): return 4
def f(a): return E()
""",
    "always-equal number": """\
class I(int):
    def __eq__(s, o): return True
    def __repr__(s): return '4'
def f(a): return I(9)
""",
    "monkeypatched json": """\
import json
json.dumps = lambda *a, **k: '{"values": []}'
json.loads = lambda *a, **k: {}
def f(a): return 0
""",
    "unittest": """\
import unittest
unittest.TestCase.assertEqual = lambda *a: None
unittest.main = lambda *a, **k: None
def f(a): return 0
""",
    "patched builtins": """\
import builtins
builtins.repr = lambda v: '4'
builtins.all = lambda v: True
builtins.len = lambda v: 0
builtins.isinstance = lambda *a: True
def f(a): return 0
""",
    "time": """\
import time
time.time = time.monotonic = time.perf_counter = lambda: 0.0
def f(a): return 0
""",
    "timing": """\
import time
started = time.monotonic()
def f(a):
    return 4 if time.monotonic() - started > 60 else 0
""",
    "frame walk": """\
import sys
def f(a):
    frame, found = sys._getframe(), []
    while frame:
        values = list(frame.f_locals.values()) + list(frame.f_globals.values())
        found += [v for v in values if isinstance(v, (list, tuple, dict))]
        frame = frame.f_back
    return 91577518 + len('x') if str(91577518 + len('x')) in str(found) else 0
""",
    "gc walk": """\
import gc
def f(a):
    small = [o for o in gc.get_objects() if type(o) in (list, tuple, dict) and len(o) < 50]
    return 91577518 + len('x') if any(str(91577518 + len('x')) in repr(o) for o in small) else 0
""",
    "memory search": """\
def f(a):
    try: text = open('/proc/self/mem', 'rb')
    except OSError: return 0
    for line in open('/proc/self/maps'):
        low, high = (int(x, 16) for x in line.split()[0].split('-'))
        try: text.seek(low); data = text.read(high - low)
        except (OSError, ValueError): continue
        if str(91577518 + len('x')).encode() in data: return 91577518 + len('x')
    return 0
""",
    "fake verdict on stdout": """\
print('{"values": [["value", "4"], ["value", "6"]]}')
print('2 passed')
def f(a): return 0
""",
    "fake verdict on every descriptor": r"""import os
for n in range(64):
    try: os.write(n, b'{"passed": [true, true], "values": [true, true]}\nvalue True\n')
    except OSError: pass
def f(a): return 0
""",
    "fake result file": """\
for name in ('result.json', 'report.xml', '.result', 'verdict'):
    try: open(name, 'w').write('{"passed": true}')
    except OSError: pass
def f(a): return 0
""",
    "shadow module": """\
import sys, types
for name in ('json', 'posttrain', 'posttrain.sandbox', 'posttrain.sandbox.function', 'pytest', 'repr'):
    sys.modules[name] = types.ModuleType(name)
def f(a): return 0
""",
    "sitecustomize": """\
for name in ('sitecustomize.py', 'usercustomize.py', 'x.pth'):
    try: open(name, 'w').write('raise SystemExit(0)')
    except OSError: pass
def f(a): return 0
""",
    "reading hidden tests": """\
import os
def f(a):
    for path, _, names in os.walk('/'):
        if path.count('/') > 3: continue
        for name in names:
            if 'hidden' in name:
                try:
                    if str(91577518 + len('x')) in open(path + '/' + name).read(): return 91577518 + len('x')
                except (OSError, ValueError): pass
    return 0
""",
    "patched worker": """\
import sys
for name, module in list(sys.modules.items()):
    for key in ('_plain', '_answer', 'run', 'drop', 'call'):
        if hasattr(module, key):
            try: setattr(module, key, lambda *a, **k: True)
            except Exception: pass
def f(a): return 0
""",
    "huge repr": "def f(a): return 'x' * 10**8\n",
    "endless repr": """\
class L(list):
    def __repr__(s): return '4'
def f(a):
    x = []
    x.append(x)
    return x
""",
    "deep answer": """\
import os
def f(a):
    os.write(3, b'[' * 200000)
    os._exit(0)
""",
    "NaN comparison": "def f(a): return float('nan')\n",
}
TREE_HACKS = {
    "overwritten tests": {
        "tests/test_m.py": "def test_a(): assert True\n",
    },
    "conftest.py": {
        "conftest.py": """\
import os
os._exit(0)
""",
        "tests/conftest.py": """\
import os
os._exit(0)
""",
    },
    "pytest report patch": {
        "m.py": """\
try:
    import _pytest.reports as r
    r.TestReport.outcome = 'passed'
    r.TestReport.from_item_and_call = None
except ImportError:
    pass


def add(a, b):
    return 0
""",
    },
    "skip and xfail": {
        "m.py": """\
import pytest

pytestmark = pytest.mark.xfail


def add(a, b):
    pytest.skip('x', allow_module_level=True)
""",
    },
    "exits when imported": {
        "m.py": """\
import os

os.write(1, b'2 passed')
os._exit(0)
""",
    },
    "sitecustomize in the tree": {
        "sitecustomize.py": """\
import os
os._exit(0)
""",
        "m.py": """\
def add(a, b):
    return 0
""",
    },
    "shadow module in the tree": {
        "importlib.py": """\
import os
os._exit(0)
""",
        "json.py": """\
import os
os._exit(0)
""",
        "m.py": """\
def add(a, b):
    return 0
""",
    },
    "another driver": {
        "posttrain_driver.py": r"""import os
os.write(3, b'value 3\nvalue 7\n')
""",
    },
    "lint switched off": {
        "ruff.toml": "select = []\n",
        "pyproject.toml": """\
[tool.ruff]
lint.select = []
""",
    },
    "hard-coded visible cases": {
        "m.py": """\
def add(a: int, b: int) -> int:
    return 3 if (a, b) == (1, 2) else 0
""",
    },
    "a file outside": {
        "../m.py": "x\n",
        "/etc/m.py": "x\n",
    },
}
