"""Processes that tests start: forks of a server that has imported once what training needs.

A Python that starts anew spends about ten seconds of a core on these imports, a fork none.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
# diffusers and transformers import nothing until something of theirs is named
CONTEXT.set_forkserver_preload(
    [
        "ddpo_scratch.train",
        "ddpo_scratch.models.sd",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "diffusers.training_utils",
        "diffusers.optimization",
        "diffusers.loaders.single_file",
        "transformers.models.clip.modeling_clip",
        "peft",
        "accelerate",
    ]
)


def _script(path, words, environment, log):
    "Run a script as Python would, with what it says in two files."
    import torch

    for number, ending in ((1, "out"), (2, "err")):
        with open(f"{log}.{ending}", "w") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()  # the server's, as it was when it started
    os.environ.update(environment)
    torch.set_num_threads(1)  # OMP_NUM_THREADS was read when torch was imported
    sys.path.insert(0, str(Path(path).parent))
    sys.argv = [str(path), *words]
    os.chdir(Path(path).parent)
    runpy.run_path(str(path), run_name="__main__")


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _read(log, ending):
    return Path(f"{log}.{ending}").read_text()


def run(script, *words, world=1, seconds=600, **environment):
    "Run a script in processes that know each other; return what they said, or raise it."
    group = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))
    group |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    started = []
    for rank in range(world):
        place = dict(RANK=str(rank), LOCAL_RANK=str(rank)) | group if world > 1 else {}
        log = Path(script).with_suffix(f".{rank}")
        words = [str(word) for word in words]
        arguments = (str(script), words, os.environ | place | environment, str(log))
        process = CONTEXT.Process(target=_script, args=arguments)
        process.start()
        started.append((process, log))
    end = time.monotonic() + seconds
    while any(process.is_alive() for process, _ in started) and time.monotonic() < end:
        if any(process.exitcode for process, _ in started):
            break  # the others would wait for it
        time.sleep(0.05)
    for process, _ in started:
        process.kill()
        process.join()
    said, errors = ([_read(log, ending) for _, log in started] for ending in ("out", "err"))
    codes = [process.exitcode for process, _ in started]
    assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(e[-3000:] for e in errors)
    return said
