# SPDX-License-Identifier: Apache-2.0
"""What happens to a server's processes, as lines of JSON."""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Any

from nb_sparse_adam._src.parameter_server.spec import Config

log_of_events = logging.getLogger("nb_sparse_adam.parameter_server")


def tell_event(event: str, config: Config, shard: int, **values: Any) -> None:
    """Log an event as one line of JSON."""
    moment = round(time.time(), 3)
    fields = {
        "time": moment,
        "event": event,
        "server": config.name,
        "shard": shard,
        "pid": os.getpid(),
        **values,
    }
    log_of_events.info("%s", json.dumps(fields))
