"""The coordinator: it joins the classes, sends the common model out and merges what comes back.

It never sees a sequence. The folder `output` has `union.json`, and `round1`, `round2` ...: model
folders of bioscan_xla.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from bioscan_flower.files import LABELS, pack, unpack
from bioscan_xla.federation.agreement import unite
from bioscan_xla.federation.merging import merge
from bioscan_xla.federation.share import FILES
from bioscan_xla.options import LabelUnionConfig, MergeConfig

app = ServerApp()
log = logging.getLogger("flwr")


def ask(grid: Grid, kind: str, contents: dict[int, RecordDict], number: int, seconds: float):
    """Send a message to every site; yields the number of each site and what it answered."""
    messages = [
        Message(content, dst_node_id=node, message_type=kind, group_id=str(number))
        for node, content in contents.items()
    ]
    for reply in grid.send_and_receive(messages, timeout=seconds):
        node = reply.metadata.src_node_id
        if reply.has_error():
            log.warning("site %s failed: %s", node, reply.error.reason)
        else:
            yield node, reply.content


def wait_for(grid: Grid, sites: int, seconds: float) -> Iterable[int]:
    """The sites that have connected, once there are enough."""
    end = time.monotonic() + seconds
    while len(nodes := sorted(grid.get_node_ids())) < sites:
        if time.monotonic() > end:
            raise RuntimeError(f"{len(nodes)} of {sites} sites have connected in {seconds:g} s")
        time.sleep(1)
    return nodes


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Agree on the classes, then round after round."""
    run = context.run_config
    output, seconds = Path(str(run["output"])), float(run["wait-seconds"])
    received = output / "received"
    nodes = wait_for(grid, int(run["sites"]), seconds)

    contents = {node: RecordDict() for node in nodes}
    files = []
    for node, content in ask(grid, "query", contents, 0, seconds):
        folder = unpack(content, received / "labels" / str(node), [LABELS])
        files.append(str(folder / LABELS))
    common = output / "union"
    config = LabelUnionConfig(
        sites=files, output=str(common / LABELS), min_sequences=int(run["min-sequences"])
    )
    union, conflicts = unite(config)
    for line in conflicts:
        log.warning("several lineages: %s", line)
    log.info("classes: %s", union.num_classes)

    options = json.loads(str(run["options"]))
    names: tuple[str, ...] = (LABELS,)
    for number in range(1, int(run["rounds"]) + 1):
        content = pack(common, names)
        content["round"] = ConfigRecord({"number": number})
        here = received / f"round{number}"
        shutil.rmtree(here, ignore_errors=True)
        for node, answer in ask(grid, "train", dict.fromkeys(nodes, content), number, seconds):
            (here / str(node)).mkdir(parents=True)
            unpack(answer, here / str(node))
        used, left_out = merge(
            MergeConfig(
                sites=[str(here / str(node)) for node in nodes],
                labels=str(output / "union" / LABELS),
                output=str(output / f"round{number}"),
                model=options.get("model"),
            )
        )
        told = ", ".join(f"{site.name} {site.sequences}" for site in used)
        log.info("round %d: %s; left out %d", number, told, len(left_out))
        common, names = output / f"round{number}", FILES
