"""Random numbers by key: the same in every layout, and safe with several threads in one process."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import torch

from holdfast.runtime import rng

CPU = torch.device("cpu")

# A collection in the midst of reading a state, which yields the GIL, is what stops a process without our lock.
THREADS = """
import gc, sys, threading, time
import torch
from holdfast.runtime import rng

cpu = torch.device("cpu")
sys.setswitchinterval(1e-6)
gc.set_threshold(1)
gc.callbacks.append(lambda phase, info: time.sleep(0.0001))

def read():
    for _ in range(100):
        with rng.preserved(cpu):
            rng.capture(cpu)

def seed():
    for n in range(1000):
        rng.seed_device(cpu, n)

threads = [threading.Thread(target=work) for work in (read, read, seed, seed)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("done")
"""


def test_threads_that_seed_and_read_generators_never_stand_still() -> None:
    run = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120)
    assert run.stdout == "done\n", run.stderr


def test_captured_generators_go_on_where_they_were() -> None:
    with rng.seeded(CPU, 5):
        state = rng.capture(CPU)

        def draw() -> tuple[float, float, torch.Tensor]:
            return random.random(), float(np.random.rand()), torch.rand(3)

        first = draw()
        draw()
        rng.restore(state, CPU)
        again = draw()
    assert first[:2] == again[:2]
    assert torch.equal(first[2], again[2])


def test_generators_are_left_as_they_were_found() -> None:
    before = rng.capture(CPU)
    with rng.seeded(CPU, 7):
        torch.rand(1), random.random(), np.random.rand()
    after = rng.capture(CPU)
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["python"]["internal"], after["python"]["internal"])
    assert torch.equal(before["numpy"]["keys"], after["numpy"]["keys"])
