"""A script that knows nothing of Holdfast: prints its environment; --fail: rank 1 exits with code 7."""

import json
import os
import sys
import time

NAMES = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT "
    "TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID"
)
found = {name: os.environ[name] for name in NAMES.split()}
os.write(1, json.dumps({**found, "argv": sys.argv}).encode() + b"\n")
if "--fail" in sys.argv:
    if found["RANK"] == "1":
        time.sleep(0.5)
        sys.exit(7)
    time.sleep(60)
