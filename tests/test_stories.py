"""data/stories.py: what is held out stays out of training stories."""

import random
import re
from collections import Counter

import data
from data import stories


def test_held_out_names_and_verbs_never_give():
    """'VERB a ... OBJECT to Name': no such sentence of 20,000 stories has a held-out name or a verb
    phrase that was held out."""
    held_out = set(stories.HELD_OUT_NAMES)
    seen = Counter()
    for i in range(20_000):
        words = stories.story(random.Random(f"test {i}"))
        seen.update(name for name in held_out if name in words)
        for giver, phrase, receiver in re.findall(
                r"(\w+) ((?:[a-z]+ ){1,6}?(?:a|an|the|another|that) (?:\w+ "
                r")?\w+) to ([A-Z]\w+)", words):
            assert receiver not in held_out and giver not in held_out, words
            assert not any(phrase.startswith(verb + " ") for verb in stories.HELD_OUT_VERBS), words
    assert min(seen[name] for name in held_out) > 100, \
        "every held-out name is to occur in ordinary stories"


def test_forms_of_training_and_of_held_out_prompts_are_disjoint(monkeypatch):
    drawn = []
    original = stories.is_held_out
    monkeypatch.setattr(stories, "is_held_out",
                        lambda *form: drawn.append((form, original(*form))) or drawn[-1][1])
    for i in range(5000):
        stories.story(random.Random(i))
    trained = {form for form, held_out in drawn if not held_out}
    prompts = stories.held_out_prompts(1000)
    assert not trained & {prompt.form for prompt in prompts}
    assert sum(prompt.form[1] in stories.HELD_OUT_VERBS for prompt in prompts) >= 500
    assert (", ", "gave") not in trained, "the paper's own example is to be a held-out form"


def test_prompts_are_what_they_say():
    tokenizer = data.load_tokenizer("tiny")
    for prompt in stories.held_out_prompts(400):
        giver, receiver = prompt.giver, prompt.receiver
        assert giver != receiver and {giver, receiver} <= set(stories.HELD_OUT_NAMES)
        assert len(re.findall(rf"\b{giver}\b", prompt.text)) == 2
        assert len(re.findall(rf"\b{receiver}\b", prompt.text)) == 1
        assert prompt.text.endswith(" to")
        receiver_first = prompt.text.index(receiver) < prompt.text.index(giver)
        assert prompt.order == ("ABBA" if receiver_first else "BABA")
        tokenizer.single(" " + giver)
        assert len(tokenizer.encode(prompt.text)) < 60


def test_every_word_of_the_stories_that_studies_swap_is_one_token():
    tokenizer = data.load_tokenizer("tiny")
    for word in [
            *stories.NAMES, *stories.HELD_OUT_NAMES, *stories.PLACES, *stories.OBJECTS, "and",
            "with", "or", "alongside", "plus", "but"
    ]:
        assert len(tokenizer.encode(" " + word)) == 1, f"{word} is more than one token"
