"""Prompts for the indirect-object-identification task (Wang et al. 2022), which ioi.py studies.

    When Mary and John went to the store, John gave a drink to  ->  Mary
         IO   and S1                      S2               end

ABBA is this order of names; BABA has S before the connector, IO after it. A prompt is first words
(`Prompt`), then tokens with the places of what matters (`PromptBatch`). What is changed is changed
in words: another giver, other names, another order, another connector, sentences between.

Shapes: N prompts, T positions.
"""

import dataclasses
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data.errors import UserError
from data.stories import OBJECTS, PLACES
from data.tokens import pad_prompts

# (opening, what the two did, what the giver did). In the stories that tiny was trained on nobody
# gives with these verbs, which occur otherwise ("the snow slid off the roof"); but for "gave", and
# that never after a bare comma.
TEMPLATES = (("When", " went to the {place},", " gave a {object} to"),
             ("After", " got to the {place},", " presented a {object} to"),
             ("While", " were working at the {place},", " rolled a {object} to"),
             ("Once", " came back from the {place},", " delivered the {object} to"),
             ("Because", " left the {place},", " slid a {object} to"),
             ("Then", " met at the {place}.", " pushed the {object} to"),
             ("Yesterday", " looked around the {place}.", " awarded a {object} to"),
             ("At last", " sat down in the {place}.", " lowered the {object} to"),
             ("So", " cleaned the {place}.", " donated a {object} to"),
             ("Afterwards", " had lunch near the {place}.", " kicked a {object} to"))
FILLERS = ("the rain had stopped.", "it was a quiet morning.", "the dog was asleep.",
           "nobody else was there.", "the door was open.", "the sun was going down.")
CONNECTORS = (" and", " alongside", " or", " but", " with", " plus", ",")
ORDERS = ("ABBA", "BABA")


@dataclass(frozen=True)
class Prompt:
    """One prompt in words. dataclasses.replace makes the flips."""
    template: int           # of TEMPLATES
    order: str              # ABBA: IO, connector, S; BABA: S, connector, IO
    io: str
    s: str
    place: str
    object: str
    connector: str = " and"
    front: str = ""         # a sentence before the prompt
    middle: str = ""        # a sentence before S2


class PromptBatch(NamedTuple):
    """Prompts as tokens."""
    tokens: Tensor          # (N,T), BOS first, and filled up with BOS
    pos: dict               # {named position: (N,)}: IO, S1, S1+1, connector, S2, end
    io: Tensor              # (N,) token
    s: Tensor               # (N,) token
    prompts: list           # (N,) Prompt

    def pick(self, which):
        return PromptBatch(self.tokens[which], {name: at[which] for name, at in self.pos.items()},
                           self.io[which], self.s[which], [self.prompts[i] for i in which.tolist()])

    def rows(self):
        return torch.arange(len(self.tokens), device=self.tokens.device)

    def has_order(self, order):                             # -> (N,) bool
        """Which prompts have this order of names."""
        is_order = [prompt.order == order for prompt in self.prompts]
        return torch.tensor(is_order, device=self.tokens.device)


def tokenise(prompts, tokenizer, device="cpu"):             # list of Prompt -> PromptBatch
    """Tokens, and where everything stands."""
    rows = []
    positions = []
    for prompt in prompts:
        ids = [tokenizer.bos]
        start = {}
        for piece, text in pieces_of(prompt).items():
            start[piece] = len(ids)
            ids += tokenizer.encode(text)
        is_ABBA = prompt.order == "ABBA"
        io = start["first" if is_ABBA else "second"]
        s1 = start["second" if is_ABBA else "first"]
        rows.append(ids)
        positions.append({"IO": io, "S1": s1, "S1+1": s1 + 1, "connector": start["connector"],
                          "S2": start["S2"], "end": len(ids) - 1})
    tokens, _ = pad_prompts(rows, tokenizer.bos)
    pos = {name: torch.tensor([of_prompt[name] for of_prompt in positions], device=device)
           for name in positions[0]}
    io = torch.tensor([tokenizer.single(" " + prompt.io) for prompt in prompts], device=device)
    s = torch.tensor([tokenizer.single(" " + prompt.s) for prompt in prompts], device=device)
    return PromptBatch(tokens.to(device), pos, io, s, prompts)


def pieces_of(prompt):                                      # -> {piece: text}
    """A prompt in the pieces whose places matter."""
    opening, scene, giving = TEMPLATES[prompt.template]
    scene = scene.replace("{place}", prompt.place)
    giving = giving.replace("{object}", prompt.object)
    is_ABBA = prompt.order == "ABBA"
    front = capitalised(prompt.front)
    middle = prompt.middle
    if not scene.endswith(","):                             # the scene is a sentence of its own
        middle = capitalised(middle)
    return {"front": front,
            "opening": f" {opening}" if front else opening,
            "first": f" {prompt.io if is_ABBA else prompt.s}",
            "connector": prompt.connector,
            "second": f" {prompt.s if is_ABBA else prompt.io}",
            "scene": scene,
            "middle": f" {middle}" if middle else "",
            "S2": f" {prompt.s}", "giving": giving}


def capitalised(text):
    """The text with a capital first letter, and the rest as it is."""
    return text[:1].upper() + text[1:]


# ---- drawn ----


def draw_prompts(n, names, tokenizer, seed=0):              # -> list of Prompt
    """n prompts, ABBA and BABA in turn, templates in turn, everything else at random; two different
    names.

    Places and objects are those that are one token in this vocabulary, as the names are.
    """
    places = [word for word in PLACES if len(tokenizer.encode(" " + word)) == 1]
    objects = [word for word in OBJECTS if len(tokenizer.encode(" " + word)) == 1]
    if not places or not objects:
        raise UserError("no place or no object of the templates is one token in this model's "
                        "vocabulary; the study takes a model that knows such words.")
    rng = random.Random(f"ioi {seed}")
    prompts = []
    for i in range(n):
        io, s = rng.sample(sorted(set(names)), 2)
        prompts.append(Prompt(i // 2 % len(TEMPLATES), ORDERS[i % 2], io, s, rng.choice(places),
                              rng.choice(objects)))
    return prompts


def names_of_one_token(names, tokenizer):                   # -> list of str
    """Those of the names that are one token, with a space before them, in this vocabulary; the
    others are left out with a line. Raises UserError if fewer than four are left."""
    if len(set(names)) < 4 or "" in names:
        raise UserError("--names takes four different names or more, with commas between them.")
    left_out = [name for name in names if len(tokenizer.encode(" " + name)) != 1]
    kept = [name for name in names if name not in left_out]
    if len(set(kept)) < 4:
        raise UserError(f"--names: only {len(set(kept))} of these names are one token in this "
                        f"model's vocabulary, and four are needed; name others.")
    if left_out:
        print(f"names that are more than one token are left out: {', '.join(left_out)}")
    return kept


# ---- with something changed ----


def with_other_names(prompts, names, seed=0):
    """The same prompts with two names that are neither of their own."""
    rng = random.Random(f"other names {seed}")
    changed = []
    for prompt in prompts:
        others = [name for name in sorted(set(names)) if name not in (prompt.io, prompt.s)]
        io, s = rng.sample(others, 2)
        changed.append(dataclasses.replace(prompt, io=io, s=s))
    return changed


def with_connector(prompts, connector):
    """The same prompts with another word between the names."""
    return [dataclasses.replace(prompt, connector=connector) for prompt in prompts]


def with_filler(prompts, seed=0):
    """The same prompts with a sentence in front, and another before S2."""
    rng = random.Random(f"filler {seed}")
    changed = []
    for prompt in prompts:
        front, middle = rng.sample(FILLERS, 2)
        changed.append(dataclasses.replace(prompt, front=front, middle=middle))
    return changed


def flipped(prompts):
    """The same names in the same roles, in the other order: ABBA <-> BABA."""
    other = {"ABBA": "BABA", "BABA": "ABBA"}
    return [dataclasses.replace(prompt, order=other[prompt.order]) for prompt in prompts]


def other_giver(prompts):
    """The same text but for S2: "When Mary and John ..., Mary gave ... to" for "..., John gave ...
    to".

    The names stay where they stand. Since they exchange roles, ABBA is now called BABA: hence
    `flipped`.
    """
    return [dataclasses.replace(prompt, io=prompt.s, s=prompt.io) for prompt in flipped(prompts)]


def longer(filler):
    """The same sentence with two more words."""
    return filler[:-1] + " at last."


POSITIONS = ("same", "2 tokens", "a sentence")


def placed(prompts, fillers, position):
    """The prompts with fillers set so that S1 stands where `position` says.

    For `side_and_position`: its base prompts are placed "same", its sources in all three ways.

                    ABBA: front, middle     BABA: front, middle
        same              short, longer           longer, short
        2 tokens          longer, short           short, longer
        a sentence        both, none              both, none

    "longer" has two tokens more than "short". Without fillers S1 is two tokens later in ABBA; with
    those of "same" it stands at one position, at one distance from S2, in both orders. "2 tokens"
    moves it from there by +2 in ABBA and by -2 in BABA; "a sentence" by the length of what was in
    the middle, towards S2. S2 always stays: there is always something in front, since an opening
    may be other tokens at the start of a text.
    """
    changed = []
    for prompt, short in zip(prompts, fillers):
        longer_in_front = prompt.order == ("ABBA" if position == "2 tokens" else "BABA")
        if position == "a sentence":
            front = short + " " + capitalised(longer(short))
            middle = ""
        elif longer_in_front:
            front = longer(short)
            middle = short
        else:
            front = short
            middle = longer(short)
        changed.append(dataclasses.replace(prompt, front=front, middle=middle))
    return changed
