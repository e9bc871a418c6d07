"""What the programs that read a model through its SAEs have in common: some flags, how they begin and end."""

import dataclasses
from dataclasses import dataclass

import data
import model as models
from data.bpe import check_fits
from data.common import UserError, check_writable, field, pick_device, run_folder, write_json
from data.sae_files import find_saes
from sae import load_all


@dataclass(frozen=True)
class StudyConfig:
    model: str = field("tiny", "tiny, gpt2, gemma-2-2b ..., or a directory in Hugging Face layout")
    saes: str = field("", "folder with SAEs, kissane, gemma-scope; else the run in --out, else the shipped")
    corpus: str = field("python", "real text, of which held-out rows are read: see train.py")
    seed: int = field(0, "fixes all that is drawn at random")
    device: str = field("auto", "cpu, cuda, mps or auto")
    out: str = field("out", "folder for results")


def begin(config, name, layers=()):                     # -> model, tokenizer, {layer: SAE}, folder
    """Load what a study reads, and make <out>/<model>/<name>/."""
    device = pick_device(config.device)
    model, tokenizer = models.load(config.model, device), data.tokenizer(config.model)
    check_fits(tokenizer, model, config.model)
    saes = load_all(find_saes(config.saes, config.out, config.model), model, layers, device)
    folder = run_folder(config.out, config.model) / name
    check_writable(folder)
    return model, tokenizer, saes, folder


def finish(config, folder):
    """Say where the results are, and note beside them how they were made."""
    where = find_saes(config.saes, config.out, config.model)
    write_json(folder / "config.json", dataclasses.asdict(config) | {"saes": str(where)})
    print(f"\nwritten to {folder}/")


def parse_feature(text):
    """"2.271" -> (2, 271), "" -> (None, None). Raises UserError for another form."""
    if not text:
        return None, None
    layer, _, feature = text.partition(".")
    if not (layer.isdecimal() and feature.isdecimal()):
        raise UserError(f"--feature is written layer.feature, such as 2.271, not {text!r}.")
    return int(layer), int(feature)


def reported(config, text):
    """Print what others report, beside results of the same model and of no other."""
    if config.model == "gpt2":
        print(f"reported (GPT-2 Small): {text}")
