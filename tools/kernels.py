"""Kernels for tests of many notebooks: forks of a process that has imported torch and diffusers.

A kernel that starts anew spends six seconds of a core on these imports, a fork none. A notebook
finds nothing else changed: of this package nothing is imported, and nothing has been computed.

    with kernels.server(environment) as path: ...    JUPYTER_PATH=path makes python3 such a kernel

Jupyter starts a kernel as a process of its own and sends it signals; here that is a small one,
which asks the server for a fork, hands signals on, and ends when the fork does.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing import process
from multiprocessing.connection import Client, Listener
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path

PRELOAD = """
    torch diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion diffusers.training_utils
    diffusers.optimization diffusers.loaders.single_file transformers.models.clip.modeling_clip
    peft accelerate open_clip pydantic matplotlib.pyplot ipykernel.kernelapp nbdev.showdoc
""".split()
POSSIBLE = sys.platform == "linux"  # elsewhere a fork of what has loaded such libraries may crash


@contextlib.contextmanager
def server(environment, preload=PRELOAD):
    "Start a server with an environment; give the folder that names its kernels to Jupyter."
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        # -S -E: what only hands things on needs no packages
        argv = [sys.executable, "-S", "-E", __file__, "ask", address, "-f", "{connection_file}"]
        spec = Path(folder, "kernels/python3/kernel.json")
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps(dict(argv=argv, display_name="python3", language="python")))
        inline = "module://matplotlib_inline.backend_inline"
        started = subprocess.Popen(
            [sys.executable, __file__, "serve", address, *preload],
            env=environment | dict(MPLBACKEND=inline),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if not started.stdout.readline():
            raise RuntimeError(f"kernels: the server ended with code {started.wait()}")
        try:
            yield folder
        finally:
            started.stdin.close()  # its end
            started.wait()


def ask(address, *arguments):
    "Be the process that Jupyter knows: ask for a kernel, hand signals on, end with it."
    with Client(address, "AF_UNIX") as connection:
        connection.send((arguments, os.getcwd(), dict(os.environ)))
        pid = connection.recv()
        for fd in (1, 2):
            send_handle(connection, fd, pid)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        with contextlib.suppress(EOFError, OSError):
            connection.recv()


def serve(address, *preload):
    "Import what takes long; then fork a kernel for each that asks, until stdin ends."
    for module in preload:
        importlib.import_module(module)
    listener = Listener(address, "AF_UNIX", backlog=16)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the ends of kernels are nobody's business here
    print("ready", flush=True)
    while True:
        connection = listener.accept()
        if os.fork() == 0:
            listener.close()
            _be_a_kernel(connection)
        connection.close()


def _end_with_stdin():
    # not sys.stdin.read(): forks would inherit its lock as it is then, held for ever
    while os.read(0, 1):
        pass
    os._exit(0)  # ipykernel watches its parent: the kernels end too


def _be_a_kernel(connection):
    "Become what `python -m ipykernel_launcher -f FILE` would have become."
    from ipykernel.kernelapp import launch_new_instance

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    arguments, folder, environment = connection.recv()
    connection.send(os.getpid())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd in (1, 2):
        os.dup2(recv_handle(connection), fd)
    os.setsid()
    os.chdir(folder)
    process.ORIGINAL_DIR = folder  # where processes that it spawns begin
    os.environ.clear()
    os.environ.update(environment)
    del sys.path[0]  # the folder of this file
    parent = f"--IPKernelApp.parent_handle={os.getppid()}"  # whose end is the kernel's end
    sys.argv = ["ipykernel_launcher", *arguments, parent]
    threading.Thread(target=_end_with, args=[connection], daemon=True).start()
    launch_new_instance()
    os._exit(0)


def _end_with(connection):
    "End when the process that Jupyter knows was killed."
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)


if __name__ == "__main__":
    {"ask": ask, "serve": serve}[sys.argv[1]](*sys.argv[2:])
