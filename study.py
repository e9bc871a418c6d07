"""How every study begins: its common flags, the model, its SAEs, the folder for its results."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import data
from data.corpus import HELD_OUT_SHARE
from data.errors import UserError
from data.files import check_writable, claim, run_folder, write_json
from data.flags import field
from data.machine import pick_device
from data.sae_files import MLP, find_saes
from data.tokens import Tokenizer, set_n_tokens
from data.weights import PUBLISHED, digest
from model import load_model
from sae import load_saes, load_transcoders


@dataclass(frozen=True)
class StudyConfig:
    model: str = field("tiny", "tiny, gpt2, gemma-2-2b ..., the owner/name of a model on the "
                       "Hugging Face hub, or a directory in its layout")
    saes: str = field("", "folder with SAEs, kissane, gemma-scope; if not given, the run in --out, "
                      "or for tiny those that ship")
    layers: tuple[int, ...] = field((), "layers whose SAEs are read, such as 0,2; all that have "
                                    "one if not given")
    corpus: str = field("python", "real text, of which held-out rows are read: see train.py")
    held_out_share: float = field(HELD_OUT_SHARE, "of the documents of a text of yours; as in "
                                  "training")
    seed: int = field(0, "fixes all that is drawn at random")
    device: str = field("auto", "cpu, cuda, mps or auto")
    out: str = field("out", "folder for results")


class Study(NamedTuple):
    """What a study reads, and where it writes."""
    config: StudyConfig
    model: nn.Module
    tokenizer: Tokenizer
    saes: dict              # {layer: SAE}
    saes_from: str          # where they were read
    transcoders: dict       # {layer: Transcoder} that lie beside them, of these layers
    folder: Path            # <out>/<model>/<name of the study>
    device: torch.device

    @property
    def n_ctx(self):
        """Tokens in a row of text."""
        return min(128, self.model.config.n_ctx)


def begin(config, name):                                    # -> Study
    """Load what a study reads, say which SAEs these are, and make its folder."""
    if not 0 <= config.seed < 2**63:
        raise UserError("--seed must be between 0 and 2^63 - 1.")
    device = pick_device(config.device)
    model = load_model(config.model, device)
    tokenizer = data.load_tokenizer(config.model)
    set_n_tokens(model, tokenizer, config.model)
    saes_from = str(find_saes(config.saes, config.out, config.model))
    saes = load_saes(saes_from, model, config.layers, device)
    run = run_folder(config.out, config.model)
    folder = run / name
    check_writable(folder)
    claim(run, config.model, digest(model))
    print(f"SAEs of layers {', '.join(map(str, saes))}: {saes_from}", flush=True)
    transcoders = beside(saes_from, model, config.layers, device)
    if transcoders:
        print(f"transcoders of layers {', '.join(map(str, transcoders))}: {saes_from}/mlp",
              flush=True)
    return Study(config, model, tokenizer, saes, saes_from, transcoders, folder, device)


def beside(saes_from, model, layers, device):               # -> {layer: Transcoder}
    """The transcoders that lie beside some SAEs; none if there are none."""
    folder = Path(saes_from) / MLP
    if not folder.is_dir():
        return {}
    there = [layer for layer in range(model.config.n_layers) if (folder / f"L{layer}").is_dir()]
    wanted = [layer for layer in there if layer in layers or not layers]
    return load_transcoders(saes_from, model, wanted, device) if wanted else {}


def finish(study):
    """Say where the results are, and note beside them how they were made."""
    settings = dataclasses.asdict(study.config) | {"saes": study.saes_from}
    write_json(study.folder / "config.json", settings)
    print(f"\nwritten to {study.folder}/")


def held_out_rows(study, n_rows, at_least=16, flag="--n-rows"):     # -> (n_rows,T) at most
    """Rows of held-out text. Raises UserError if the text has fewer than a study needs."""
    if n_rows < 1:
        raise UserError(f"{flag} must be at least 1, not {n_rows}.")
    rows = next(data.rows(study.config.corpus, study.tokenizer, "held-out", study.n_ctx, n_rows,
                          repeat_share=0.0, held_out_share=study.config.held_out_share))
    if len(rows) < at_least:
        short = f"raise {flag}" if n_rows < at_least else "give more text"
        raise UserError(f"--corpus {study.config.corpus} gave {len(rows)} held-out rows, and "
                        f"{at_least} are needed; {short}.")
    return rows.to(study.device)


def parse_feature(text):
    """"2.271" -> (2, 271), "" -> (None, None). Raises UserError for another form."""
    if not text:
        return None, None
    layer, _, feature = text.partition(".")
    if not (layer.isdecimal() and feature.isdecimal()):
        raise UserError(f"--feature is written layer.feature, such as 2.271, not {text!r}.")
    return int(layer), int(feature)


def parse_heads(text, model):                               # "5.1,11.2" -> [(5, 1), (11, 2)]
    """Heads by layer and number. Raises UserError for one that is not there."""
    heads = []
    for name in text.split(","):
        layer, _, head = name.partition(".")
        if not (layer.isdecimal() and head.isdecimal()) or int(layer) >= model.config.n_layers \
                or int(head) >= model.config.n_heads:
            raise UserError(f"--heads: this model has no head {name!r}; one is written 5.1.")
        heads.append((int(layer), int(head)))
    return heads


def reported(study, text):
    """Print what others report, beside results of the same model and of no other."""
    if study.config.model in ("gpt2", PUBLISHED["gpt2"]):
        print(f"reported (GPT-2 Small): {text}")
