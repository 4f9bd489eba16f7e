"""What checkpoints.py runs: fixtures, the peers, and our side of each claim. Each module says what it measures.

state      the model whose state is saved: names and shapes          measure   a process: wall, CPU, memory
fixtures   the checkpoints that claims start from                    deepspeed a rank of DeepSpeed (peer's venv)
ranks      a rank that saves or loads with DCP or our Reader         alone     saves and loads in one process
"""
