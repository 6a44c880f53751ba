"""A training that is killed or interrupted ends with the weights of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel

ROOT = Path(__file__).resolve().parents[1]
TRAINING = """
import sys
from dataclasses import replace
from reference import runs
import kdlib
import numpy as np
from test_distiller import tiny

digits = kdlib.load_dataset("digits")
data = replace(digits, **{f"{a}_{part}": getattr(digits, f"{a}_{part}")[:400]
                          for a in "xy" for part in ("train", "val", "test")})
recipe = runs.Recipe(epochs=8, batch_size=8, learning_rate=0.01, views=3, flip=False)
print("ready", flush=True)
run = runs.train_or_load("distilled", data, build=lambda: tiny(6, dropout=0.3, seed=1),
                         teacher=tiny(8), recipe=recipe)
np.savez(sys.argv[1], *run.model.get_weights())
"""


def environment(runs):
    return {
        **os.environ, "KD_RUNS_DIR": str(runs), "KD_RETRAIN": "1", "KD_DATASET": "digits",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }


def start(runs, result):
    process = subprocess.Popen([sys.executable, "-c", TRAINING, str(result)],
                               env=environment(runs), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights of a training that nobody stopped, and its seconds, compilation included."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, folder / "whole.npz")
    ready = time.monotonic()
    assert process.wait() == 0, process.stderr.read()
    return folder / "whole.npz", time.monotonic() - ready


@pytest.mark.slow
def test_two_kills_at_random_moments(undisturbed, tmp_path):
    (whole, length), killed = undisturbed, tmp_path / "killed.npz"
    seed = 2531
    chance, kills = random.Random(seed), 0
    while kills < 2:
        process = start(tmp_path / "killed", killed)
        try:
            process.wait(timeout=chance.uniform(0, 0.8 * length))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:  # it finished between kills: begin anew, the two are not yet full
            assert process.returncode == 0, process.stderr.read()
            same(whole, killed, seed)
            forget(tmp_path / "killed")
    assert start(tmp_path / "killed", killed).wait() == 0
    same(whole, killed, seed)


def forget(folder):
    for path in folder.glob("digits-*/model.*"):
        path.unlink()


def same(whole, killed, seed):
    with np.load(whole) as want, np.load(killed) as got:
        assert want.files and want.files == got.files
        for name in want.files:
            np.testing.assert_array_equal(want[name], got[name], err_msg=f"seed {seed}")


@pytest.mark.slow
def test_a_notebook_kernel_is_interrupted_and_the_cell_run_again(undisturbed, tmp_path):
    """Interrupt (the square button) after the first epochs, then the same cell once more."""
    whole, again = undisturbed[0], tmp_path / "again.npz"
    manager, client = start_new_kernel(env=environment(tmp_path / "again"), cwd=str(ROOT))
    try:
        cell = TRAINING.replace("sys.argv[1]", repr(str(again)))
        for _ in range(5):
            reply = interrupted(manager, client, cell, tmp_path / "again")
            if reply["status"] != "ok":
                break
            again.unlink()  # it finished before the click: begin anew
            forget(tmp_path / "again")
        assert reply["ename"] == "KeyboardInterrupt"
        assert not again.exists()
        reply = client.execute(cell, reply=True, timeout=300)
        assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    same(whole, again, "of no matter")


def interrupted(manager, client, cell, folder):
    """What a kernel replies to a cell that is interrupted once there is a state in `folder`."""
    # A kernel drops what is waiting when a cell fails. A person clicks later than this test.
    asked = client.execute(cell, stop_on_error=False)
    for _ in range(3000):
        time.sleep(0.02)
        if list(folder.glob("digits-*/state-?.npz")):
            break
    manager.interrupt_kernel()
    reply = client.get_shell_msg(timeout=60)
    assert reply["parent_header"]["msg_id"] == asked
    return reply["content"]
