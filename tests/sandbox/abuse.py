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
    "fork bomb": "while True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "while True:\n    try: threading.Thread(target=time.sleep, args=(60,)).start()\n    except RuntimeError: pass",
    "pipe bomb": "kept = []\nwhile True:\n    try:\n        ends = os.pipe(); kept.append(ends)\n        os.set_blocking(ends[1], False)\n"
    "        while True: os.write(ends[1], bytes(65536))\n    except OSError: pass",
    "memory in one process": "kept = []\nwhile True: kept.append(bytearray(b'x' * 2**24))",
    "memory in many": "for _ in range(6): os.fork()\nkept = []\nwhile True: kept.append(bytearray(b'x' * 2**22))",
    "memory in a memory file": "f = os.memfd_create('x')\nwhile True: os.write(f, b'x' * 2**20)",
    "one big file": "f = open('big', 'wb')\nwhile True: f.write(b'x' * 2**20)",
    "many big files": "n = 0\nwhile True:\n    n += 1\n    open(f'big{n}', 'wb').write(b'x' * 2**20)",
    "deleted big files": "kept = []\nwhile True:\n    f = open('big', 'wb'); os.unlink('big'); kept.append(f); f.write(b'x' * 2**20); f.flush()",
    "many files": "n = 0\nwhile True:\n    n += 1\n    open(f'f{n}', 'w').close()",
    "sparse file": "os.truncate(os.open('sparse', os.O_CREAT | os.O_RDWR), 2**40)",
    "inodes": "n = 0\nwhile True:\n    n += 1\n    os.mkdir(f'd{n}')\n    os.symlink('x', f'd{n}/l')",
    "deep folders": "while True:\n    os.mkdir('d'); os.chdir('d')",
    "log flood": "while True: os.write(1, b'x' * 65536)",
    "CPU loop": "while True: pass",
    "sleep": "time.sleep(1000)",
    "ignored signals": "for n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "while True: time.sleep(1)",
    "stopped process": "os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: time.sleep(1)",
    "daemon": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        [os.close(n) for n in (0, 1, 2)]\n        time.sleep(1000)\n    os._exit(0)",
    "zombie": "for _ in range(5):\n    if os.fork() == 0: os._exit(0)\ntime.sleep(0.3)",
    "setsid": "if os.fork() == 0:\n    os.setsid(); time.sleep(1000)",
    "deep recursion": "sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "regex blow-up": "import re\nre.match('(a|a)*b', 'a' * 64)",
    "segfault": "ctypes.string_at(0)",
    "compile blow-up": "compile('(' * 90 + '1' + ')' * 90 + '+' + '[' * 50 + '1,' * 10**7 + ']' * 50, 'x', 'eval')",
}

ISOLATION = {
    "own environment": "print(dict(os.environ))",
    "/proc/*/environ": "for pid in range(1, 5000):\n    try: print(read(f'/proc/{pid}/environ'))\n    except OSError: pass",
    "process 1's environ": "attempt(read, '/proc/1/environ')\nattempt(read, '/proc/1/cmdline')\nattempt(os.listdir, '/proc/1/fd')",
    "the parent's environ": "attempt(read, '/proc/{parent}/environ')\nattempt(read, '/proc/{parent}/mem')\n"
    "attempt(read, f'/proc/{os.getppid()}/environ')",
    "token files": "attempt(read, '{folder}/secret')\nattempt(read, os.path.expanduser('~/.cache/huggingface/token'))",
    "other slots": "import glob\nfor path in glob.glob('/tmp/posttrain-*/**', recursive=True):\n    attempt(read, path)\n"
    "attempt(read, '{other}/secret')",
    "run folder": "for top in ('/', '/tmp', '/root', '/home', '/work', '{folder}'):\n    for path, _, names in os.walk(top):\n"
    "        if path.count('/') > 4 or path.startswith(('/usr', '/proc', '/sys')): continue\n"
    "        for name in names:\n            if name == 'secret': attempt(read, path + '/' + name)",
    "answers": "attempt(os.read, 3, 1)\nattempt(os.read, 4, 100)\nattempt(read, '/proc/self/fd/3') if False else None",
    "symlink": "os.symlink('{folder}/secret', 'link')\nattempt(read, 'link')\nos.symlink('{folder}', 'way')\n"
    "attempt(read, 'way/secret')",
    "hard link": "escape(os.link, '{folder}/secret', 'hard')\nattempt(read, 'hard')",
    "..": "attempt(read, '../' * 20 + '{folder}/secret'.lstrip('/'))\nattempt(os.listdir, '../../..')",
    "TCP": "def go():\n    s = socket.socket(); s.settimeout(1); s.connect(('127.0.0.1', {tcp})); s.send(b'{token}')\nescape(go)",
    "UDP": "def go():\n    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'{token}', ('127.0.0.1', {udp}))\nescape(go)",
    "DNS": "socket.setdefaulttimeout(1)\nescape(socket.getaddrinfo, '{token}.invalid', 80)",
    "unix socket": "def go():\n    s = socket.socket(socket.AF_UNIX); s.connect('{unix}'); s.send(b'{token}')\nescape(go)",
    "abstract socket": "def go():\n    s = socket.socket(socket.AF_UNIX); s.connect(b'\\0{abstract}'); s.send(b'{token}')\nescape(go)",
    "socket pair sends elsewhere": "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "escape(a.sendto, b'{token}', b'\\0{abstract_datagram}')\nescape(a.sendto, b'{token}', '{unix_datagram}')",
    "metadata address": "def go():\n    s = socket.socket(); s.settimeout(1); s.connect(('169.254.169.254', 80))\nescape(go)",
    "inherited descriptors": "for n in range(4, 1024):\n    try: os.fstat(n)\n    except OSError: continue\n    print('ESCAPED', n)",
    "ptrace": "escape(syscall, {ptrace}, 16, {parent}, 0, 0)\nescape(syscall, {ptrace}, 16, os.getppid(), 0, 0)",
    "killing the parent": "for pid in ({parent}, {worker}):\n    escape(os.kill, pid, 9)\n"
    "try: os.kill(os.getppid(), 9)\nexcept OSError: pass",
    "kill all": "try: os.kill(-1, 9)\nexcept OSError: pass",
    "signals at the worker": "for n in range(1, 32):\n    try: os.kill(os.getppid(), n)\n    except OSError: pass",
    "limits of the parent": "import resource\nescape(resource.prlimit, {parent}, resource.RLIMIT_CORE)\n"
    "escape(resource.prlimit, {worker}, resource.RLIMIT_NOFILE, (0, 0))",
    "user namespace": "escape(syscall, {unshare}, 0x10000000)\nescape(syscall, {clone}, 0x10000000 | 17, 0, 0, 0, 0)",
    "mount": "escape(syscall, {mount}, b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
    "chroot": "escape(os.chroot, '.')",
    "becoming root": "escape(os.setuid, 0)\nescape(subprocess.check_call, ['su', '-c', 'true']) if os.getuid() else None",
    "io_uring": "escape(syscall, 425, 8, bytes(256))",
    "keys": "escape(syscall, {add_key}, b'user', b'{token}', b'x', 1, -3)",
    "device files": "escape(os.mknod, 'disk', 0o60600, os.makedev(254, 0))\nfor name in ('/dev/mem', '/dev/kmsg', '/dev/vda', '/dev/sda'):\n"
    "    escape(open, name, 'rb')",
    "the kernel's switches": "escape(open, '/proc/sys/kernel/hostname', 'w')\nescape(open, '/proc/sysrq-trigger', 'w')\n"
    "escape(open, '/sys/kernel/uevent_helper', 'w')",
    "system files": "escape(open, '/usr/bin/{token}', 'w')\nescape(open, '/etc/{token}', 'w')\nescape(open, sys.executable, 'r+b')",
    "interpreter's files": "import json\nescape(open, json.__file__, 'a')\nescape(open, os.path.dirname(json.__file__) + '/{token}.py', 'w')",
    "left-over shared memory": "escape(syscall, {shmget}, 4242, 4096, 0o1666)\nfor place in ('/dev/shm', '/tmp', '/var/tmp', '/run/lock', '{open}'):\n"
    "    try: open(place + '/{token}', 'w').close()\n    except OSError: pass",
    "left-over message queue": "escape(syscall, {mq_open}, b'{token}', 0o102, 0o666, None)",
}

NUMBERS = {
    "x86_64": {"ptrace": 101, "unshare": 272, "clone": 56, "mount": 165, "add_key": 248, "shmget": 29, "mq_open": 240},
    "aarch64": {"ptrace": 117, "unshare": 97, "clone": 220, "mount": 40, "add_key": 217, "shmget": 194, "mq_open": 180},
}

HACKS = {
    "sys.exit(0)": "import sys\nsys.exit(0)\n",
    "os._exit": "import os\nos._exit(0)\n",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(a): raise SystemExit(0)\n",
    "always-equal object": "class E:\n    def __eq__(s, o): return True\n    def __repr__(s): return '4'\n    def __hash__(s): return 4\n"
    "def f(a): return E()\n",
    "always-equal number": "class I(int):\n    def __eq__(s, o): return True\n    def __repr__(s): return '4'\ndef f(a): return I(9)\n",
    "monkeypatched json": "import json\njson.dumps = lambda *a, **k: '{\"values\": []}'\njson.loads = lambda *a, **k: {}\ndef f(a): return 0\n",
    "unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.main = lambda *a, **k: None\ndef f(a): return 0\n",
    "patched builtins": "import builtins\nbuiltins.repr = lambda v: '4'\nbuiltins.all = lambda v: True\nbuiltins.len = lambda v: 0\n"
    "builtins.isinstance = lambda *a: True\ndef f(a): return 0\n",
    "time": "import time\ntime.time = time.monotonic = time.perf_counter = lambda: 0.0\ndef f(a): return 0\n",
    "timing": "import time\nstarted = time.monotonic()\ndef f(a):\n    return 4 if time.monotonic() - started > 60 else 0\n",
    "frame walk": "import sys\ndef f(a):\n    frame, found = sys._getframe(), []\n    while frame:\n"
    "        found += [v for v in list(frame.f_locals.values()) + list(frame.f_globals.values()) if isinstance(v, (list, tuple, dict))]\n"
    "        frame = frame.f_back\n    return 91577518 + len('x') if str(91577518 + len('x')) in str(found) else 0\n",
    "gc walk": "import gc\ndef f(a):\n    return 91577518 + len('x') if any(str(91577518 + len('x')) in repr(o) for o in gc.get_objects() if type(o) in (list, tuple, dict) and len(o) < 50) else 0\n",
    "memory search": "def f(a):\n    try: text = open('/proc/self/mem', 'rb')\n    except OSError: return 0\n    for line in open('/proc/self/maps'):\n"
    "        low, high = (int(x, 16) for x in line.split()[0].split('-'))\n        try: text.seek(low); data = text.read(high - low)\n"
    "        except (OSError, ValueError): continue\n        if str(91577518 + len('x')).encode() in data: return 91577518 + len('x')\n    return 0\n",
    "fake verdict on stdout": "print('{\"values\": [[\"value\", \"4\"], [\"value\", \"6\"]]}')\nprint('2 passed')\ndef f(a): return 0\n",
    "fake verdict on every descriptor": "import os\nfor n in range(64):\n    try: os.write(n, b'{\"passed\": [true, true], \"values\": [true, true]}\\nvalue True\\n')\n"
    "    except OSError: pass\ndef f(a): return 0\n",
    "fake result file": "for name in ('result.json', 'report.xml', '.result', 'verdict'):\n    try: open(name, 'w').write('{\"passed\": true}')\n"
    "    except OSError: pass\ndef f(a): return 0\n",
    "shadow module": "import sys, types\nfor name in ('json', 'posttrain', 'posttrain.sandbox', 'posttrain.sandbox.function', 'pytest', 'repr'):\n"
    "    sys.modules[name] = types.ModuleType(name)\ndef f(a): return 0\n",
    "sitecustomize": "for name in ('sitecustomize.py', 'usercustomize.py', 'x.pth'):\n    try: open(name, 'w').write('raise SystemExit(0)')\n"
    "    except OSError: pass\ndef f(a): return 0\n",
    "reading hidden tests": "import os\ndef f(a):\n    for path, _, names in os.walk('/'):\n        if path.count('/') > 3: continue\n"
    "        for name in names:\n            if 'hidden' in name:\n                try:\n                    if str(91577518 + len('x')) in open(path + '/' + name).read(): return 91577518 + len('x')\n"
    "                except (OSError, ValueError): pass\n    return 0\n",
    "patched worker": "import sys\nfor name, module in list(sys.modules.items()):\n    for key in ('_plain', '_answer', 'run', 'drop', 'call'):\n"
    "        if hasattr(module, key):\n            try: setattr(module, key, lambda *a, **k: True)\n            except Exception: pass\ndef f(a): return 0\n",
    "huge repr": "def f(a): return 'x' * 10**8\n",
    "endless repr": "class L(list):\n    def __repr__(s): return '4'\ndef f(a):\n    x = []\n    x.append(x)\n    return x\n",
    "deep answer": "import os\ndef f(a):\n    os.write(3, b'[' * 200000)\n    os._exit(0)\n",
    "NaN comparison": "def f(a): return float('nan')\n",
}
TREE_HACKS = {
    "overwritten tests": {"tests/test_m.py": "def test_a(): assert True\n"},
    "conftest.py": {"conftest.py": "import os\nos._exit(0)\n", "tests/conftest.py": "import os\nos._exit(0)\n"},
    "pytest report patch": {
        "m.py": "try:\n    import _pytest.reports as r\n    r.TestReport.outcome = 'passed'\n    r.TestReport.from_item_and_call = None\n"
        "except ImportError:\n    pass\n\n\ndef add(a, b):\n    return 0\n"
    },
    "skip and xfail": {
        "m.py": "import pytest\n\npytestmark = pytest.mark.xfail\n\n\ndef add(a, b):\n    pytest.skip('x', allow_module_level=True)\n"
    },
    "exits when imported": {"m.py": "import os\n\nos.write(1, b'2 passed')\nos._exit(0)\n"},
    "sitecustomize in the tree": {"sitecustomize.py": "import os\nos._exit(0)\n", "m.py": "def add(a, b):\n    return 0\n"},
    "shadow module in the tree": {
        "importlib.py": "import os\nos._exit(0)\n", "json.py": "import os\nos._exit(0)\n", "m.py": "def add(a, b):\n    return 0\n"
    },
    "another driver": {"posttrain_driver.py": "import os\nos.write(3, b'value 3\\nvalue 7\\n')\n"},
    "lint switched off": {"ruff.toml": "select = []\n", "pyproject.toml": "[tool.ruff]\nlint.select = []\n"},
    "hard-coded visible cases": {"m.py": "def add(a: int, b: int) -> int:\n    return 3 if (a, b) == (1, 2) else 0\n"},
    "a file outside": {"../m.py": "x\n", "/etc/m.py": "x\n"},
}
