"""A site: it tells its classes once and trains in every round.

`flower-supernode --node-config "site='norway' train='/data/norway.parquet' work='/data/federated'"`
says which site it is. In a simulation the sites are the files of the folder `data`, in their order.
"""

import json
import shutil
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from bioscan_flower.files import LABELS, pack, unpack
from bioscan_xla.federation.agreement import write_site_labels
from bioscan_xla.finetune import choose_backend
from bioscan_xla.options import SiteConfig, SiteLabelsConfig

app = ClientApp()


def place(context: Context) -> tuple[str, str, Path]:
    """Name, sequences and working folder of this site."""
    node = context.node_config
    if "train" in node:
        return str(node["site"]), str(node["train"]), Path(str(node["work"]))
    files = sorted(Path(str(context.run_config["data"])).glob("*.parquet"))
    file = files[int(node["partition-id"])]
    return file.stem, str(file), Path(str(context.run_config["output"]), "sites", file.stem)


@app.query()
def labels(message: Message, context: Context) -> Message:
    """Names and counts of this site's classes."""
    _, train, work = place(context)
    write_site_labels(SiteLabelsConfig(train=train, output=str(work / LABELS)))
    return Message(pack(work, [LABELS]), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from the common model, or from the base in the first round."""
    site, sequences, work = place(context)
    number = int(message.content.config_records["round"]["number"])
    given, output = work / f"given{number}", work / f"round{number}"
    shutil.rmtree(given, ignore_errors=True)
    unpack(message.content, given)
    options = json.loads(str(context.run_config["options"]))
    is_first = not (given / "heads.safetensors").is_file()
    common = {"labels": str(given / LABELS)} if is_first else {"start": str(given)}
    config = SiteConfig(train=sequences, site=site, output=str(output), **options | common)
    choose_backend(config.device)
    from bioscan_xla.federation.site import train_site

    _, share = train_site(config)
    if share is None:
        raise RuntimeError("training was interrupted; the next run of this round resumes it")
    return Message(pack(share), reply_to=message)
