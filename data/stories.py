"""Short English stories from a grammar, so that a small model has names, indirect objects and
repeated nouns to learn.

A *giving sentence* is one indirect-object sentence, cut into parts that are drawn separately:

    When Mary and John went to the store   ,        John   gave     a drink   to  Mary .
    `---------- scene -----------------´  between  giver   verb     object        receiver

A *form* is a pair (between, verb): what stands between the two mentions of the giver, and how the
thing is given. Some forms are never used in training, whatever the scene, so that
`held_out_prompts` asks for a combination that was not seen: every form with a verb of
`HELD_OUT_VERBS` (never a giving verb in training), the forms that `is_held_out` picks among the
rest, and the form (", ", "gave") of the paper's own example. The names of `HELD_OUT_NAMES` occur in
ordinary stories only, where people talk, wave and listen to each other, never in a giving sentence.

Everything is a pure function of the `random.Random` passed in.
"""

import hashlib
import random
from typing import NamedTuple


def _split(text):
    """A block of phrases, divided by | and by line ends."""
    return text.replace("\n", "|").split("|")


# Names of people. Each is one token, with its leading space, in the vocabulary trained on these
# stories.
NAMES = """Adam Alice Amy Andrew Anna Ben Beth Carl Carol Chris Claire Clara Dan Daniel Dave David
Diana Ed Ella Emily Emma Eric Eva Frank Fred George Grace Greg Hannah Harry Helen Henry Ian Ivan
Jack James Jane Jason Jenny Jill Joe Josh Kate Kevin Kim Laura Leo Lily Linda Lisa Lucy Luke Maria
Mark Martin Matt Max Mike Nick Nina Nora Oliver Oscar Pam Peter Rachel Ray Rob Robert Rose Ruth
Sally Sam Sandra Sara Simon Sofia Sophie Steve Susan Ted Tim Toby Tony Vera Victor Walter Wendy Will
Zoe""".split()
HELD_OUT_NAMES = """Mary John Paul Tom Sarah Julia Charlie Bob Jessica Ryan Kelly Scott Megan Arthur
Bill Katie Richard Michelle Lewis Crystal""".split()

PLACES = """store garden school office park house river market station library kitchen beach church
farm forest hospital hotel lake museum restaurant bridge tower castle field shop street theater
harbor village bank""".split()
OBJECTS = """drink book ball ring letter cake coin map box key hat cup pen lamp bag basket bone
computer flower kiss necklace pie rope sword watch toy apple blanket bottle bowl candle card chair
clock coat drum fish gift glass mirror painting picture plate present ribbon scarf shell shirt shoe
snack spoon stone ticket umbrella violin""".split()
ANIMALS = "dog cat horse bird fox rabbit goat duck mouse bear".split()
ADJECTIVES = """small big old new red blue green round heavy light strange pretty plain broken clean
dusty golden wooden quiet busy dark bright cold warm empty crowded""".split()
FEELINGS = """happy sad tired hungry bored angry nervous proud late early calm surprised curious
thirsty""".split()
TIMES = "morning afternoon evening night summer winter spring day weekend".split()

# How the two names of a scene are joined, with the share of each in percent.
CONNECTORS = {"{a} and {b}": 60, "{a} with {b}": 14, "{a} or {b}": 12, "{a}, {b}": 14}

# What the two did. An opener such as "When" makes the scene a clause, and no opener makes it a
# sentence.
OPENERS = _split("When|After|While|Once|As|Because|Since|As soon as|The day|Before|Until")
STARTS = _split("Then |One {time}, |Yesterday |Last {time}, |Today |Later that {time}, |Once "
                "|At last |So |Afterwards ")
ACTIONS = _split("""went to the {place}|got to the {place}|arrived at the {place}
came back from the {place}|met at the {place}|were working at the {place}
were walking past the {place}|were waiting outside the {place}|were resting near the {place}
had a long talk at the {place}|had lunch near the {place}|had a lot of fun at the {place}
had been playing in the {place}|sat down in the {place}|looked around the {place}
left the {place}|cleaned the {place}
spent the {time} at the {place}|found a {object} at the {place}|saw a {animal} in the {place}
ran to the {place}|drove to the {place}|lived near the {place}|were looking for the {object}
played with the {animal}|talked about the {place}|bought a {object} at the {place}
hid behind the {place}|stood in front of the {place}|walked home from the {place}
were {feeling} at the {place}|had an argument|finished the work|ate together|were alone
closed the {place}|woke up|were both {feeling}|came home""")

# What stands between the scene and the giver: after a clause it starts with a comma, after a
# sentence with a full stop. It ends in a space, so that the giver's name follows.
BETWEEN_CLAUSES = [part.rstrip() + " " for part in _split(""", |, after a while |, in the {time}
, as always, |, for some reason |, of course, |, without a word, |, in the end
, because it was {adjective}, |, with a smile, |, at once |, as a joke, |, just before dinner,
, near the {place}, |, the {animal} slept and|, it was very {adjective}, so |, it began to rain and
, everything was {adjective} and |, it was time to go, so |, in front of everyone,
, only to be kind,
, a {adjective} {animal} came by and |, nobody else was there, so
, the {place} was {adjective}, but """)]
BETWEEN_SENTENCES = [part.rstrip() + " " for part in _split(""". |. Then |. Later |. Soon
. After a while, |. In the end, |. At the {place}, |. That {time}, |. Before they left,
. It was a {adjective} {time}. |. The rain had stopped. |. They were both {feeling}.
. There was a {object} on the table.|. A {animal} ran by. |. Nobody said a word for a while.
. As it got dark, |. The {place} was {adjective}. Suddenly
. They looked at the {animal} for a long time. |. It was {adjective} and {adjective}.
. The {animal} was {feeling}, too.|. The sun was going down, and |. They had to wait. At last
. Everyone was {feeling}. |. Somewhere a clock struck. Slowly|. It was the end of the {time}.
. The door was open. |. The {object} was {adjective} and the {place} was {adjective}. So """)]

# Ways of giving, each followed by the object.
VERBS = _split("""gave|handed|passed|sent|offered|showed|sold|lent|brought|threw|tossed|mailed|took
returned|carried|served|left|promised|wrote|loaned|paid|read|taught|dragged|shipped|decided to give
wanted to give|tried to hand|was happy to offer|agreed to sell|began to pass|promised to bring
hoped to show|planned to send|forgot to return|had to lend|would give|could not wait to show
was about to throw|quietly gave|gladly handed|quickly passed|kindly offered|had already sent
had just sold|went and brought|turned around and gave|smiled and handed|stood up and passed""")
HELD_OUT_VERBS = _split("""presented|slid|rolled|pushed|awarded|granted|kicked|donated|fetched
lowered|delivered|supplied|read out|dealt|was ready to present|wished to deliver|chose to donate
was going to award|carefully slid|proudly presented|gently rolled|got up and delivered
had finally delivered|ran over and presented""")
RECEIVER_ENDS = [".", ".", ".", " before the {time}.", ", who smiled.", ", who was {feeling}.",
                 " and went home.", " at the {place}.", " again.", " and laughed.",
                 ", but it was too late.", ". \"Thank you,\" said {receiver}.",
                 ". {receiver} was {feeling}."]
NOT_A_NAME = ["the {animal}", "the {place}", "them", "a friend", "a {feeling} man", "the teacher",
              "everyone", "the old woman"]

# What else one may do to another: two people as in a giving sentence, and nothing that is given.
MEETINGS = _split("""talked to|waved to|listened to|was kind to|said hello to|spoke to|sang to
bowed to|came up to|walked back to|ran over to|smiled at|looked at|laughed at|pointed at|waited for
sat down next to|thanked|hugged|helped|called|ran after|wanted to talk to|tried to listen to
stopped to wave to|decided to speak to|was happy to see|quietly talked to
turned around and smiled at""")

# How a story begins: never with a name, since a name is one token only with a space before it.
BEGINNINGS = _split("""It was a {adjective} {time}.|This happened near the {place}.|It was {time}.
Here is a story about a {animal}.|Listen.|Nobody was at the {place}.|The {animal} was {feeling}.
It was very {adjective}.|Once upon a time there was a {adjective} {place}.""")

# Ordinary sentences: about one person, and about two.
ALONE = _split("""{a} was {feeling}.|{a} lived in a {adjective} house near the {place}.
One {time}, {a} went to the {place}.|{a} found a {adjective} {object} in the {place}.
{a} liked the {animal}, but the {animal} was {feeling}.|{a} had a {adjective} {object}.
"Where is my {object}?" said {a}.|{a} looked for the {object} in the {place}.
The {object} belonged to {a}.|{a} had lost the {object}.
{a} walked alongside the {place} and saw a {animal}.|"I am {feeling}," said {a}.
Everyone at the {place} knew {a}.|{a} wanted a {object}, but there was only a {object}.
{a} sat down and ate a piece of cake.|Nobody had seen {a} since the {time}.
The {animal} ran to the {place}, and {a} ran after it.|{a} opened the {object} and closed it again.
The {place} was {adjective}.|At the {place} there was a {object}, plus a {adjective} {object}.
It was a {adjective} {time}.|{a} put the {object} on the table.
Two {animal}s were sleeping alongside the {place}.|{a} paid for the {object}, plus the {object}.
Then {a} went home.|The {object} rolled down the hill.|{a} pushed the door open.
The snow slid off the roof.|{a} kicked the ball over the wall.
The {object} was delivered in the {time}.
The museum presented a new {object}.|{a} lowered the rope.|{a} had to go back to the {place}.
The teacher talked to the class about the {animal}.|"Let us go to the {place}," said {a}.
{a} slept until the {time}.""")
TOGETHER = _split("""{a} and {b} were friends.|{a} met {b} at the {place}.|{a} sat next to {b}.
{a} hugged {b}.|{b} laughed, and so did {a}.|{a} waited for {b} at the {place}.|{a} thanked {b}.
{b} was older than {a}.|{a} and {b} went to the {place}.|Only {a} was {feeling}.
"What a {adjective} {object}!" said {b}.|{a} talked with {b} about the {object}.
{a} could not find {b}.
{a} called {b}.|{a} helped {b}.|{a} asked {b} about the {place}.
{b} saw the {animal} before {a} did.
{a} was {feeling}, but {b} was {feeling}.|{b} went home without {a}.
The {animal} followed {a} and {b}.
{a} or {b} had to go home.|{a} plus {b} made two.|{a} walked alongside {b}.|{b} ran after {a}.""")


class GivingPrompt(NamedTuple):
    """One indirect-object question. `text` ends right before " " + receiver; `order` is the order
    of names: ABBA when the giver is named second."""
    text: str
    receiver: str
    giver: str
    order: str  # "ABBA" or "BABA"
    form: tuple[str, str]


def is_held_out(between, verb):
    """Whether no training story ever puts this text between the names together with this way of
    giving."""
    if verb in HELD_OUT_VERBS or (between, verb) == (", ", "gave"):
        return True
    return hashlib.sha256(f"{between}|{verb}".encode()).digest()[0] < 26     # one form in ten


def story(rng):
    """One story of a few sentences: two in three have one to three giving sentences, the others are
    ordinary.
    """
    if rng.random() < 2 / 3:
        a, b = rng.sample(NAMES, 2)
        parts = [_ordinary(rng, a, b) for _ in range(rng.choice((0, 0, 1, 2)))]
        for _ in range(rng.choice((1, 2, 3))):
            parts.append(giving_sentence(rng, a, b))
            parts += [_ordinary(rng, a, b) for _ in range(rng.choice((0, 0, 1)))]
            a, b = rng.choice(((a, b), rng.sample(NAMES, 2)))
    else:
        a, b = rng.sample(NAMES if rng.random() < 0.4 else HELD_OUT_NAMES, 2)
        parts = [meeting_sentence(rng, a, b) if rng.random() < 0.4 else _ordinary(rng, a, b)
                 for _ in range(rng.randint(3, 6))]
    if parts[0].split()[0] in NAMES + HELD_OUT_NAMES or rng.random() < 0.3:
        parts.insert(0, _fill(rng, rng.choice(BEGINNINGS)))
    return " ".join(parts)


def giving_sentence(rng, a, b):
    """A giving sentence between a and b, in a form that is not held out; one in twelve has a
    receiver who is not named."""
    while True:
        scene, between, verb = _draw_form(rng, VERBS)
        if not is_held_out(between, verb):
            break
    receiver, giver = rng.sample((a, b), 2)
    text = _fill(rng, _join(rng, scene, a, b) + between + giver + " " + _give(rng, verb))
    if rng.random() < 1 / 12:
        return text + " to " + _fill(rng, rng.choice(NOT_A_NAME)) + "."
    end = _fill(rng, rng.choice(RECEIVER_ENDS)).replace("{receiver}", receiver)
    return text + " to " + receiver + end


def meeting_sentence(rng, a, b):
    """An ordinary sentence in the frame of a giving sentence: 'When Mary and John met at the store,
    John waved to Mary.'"""
    scene, between, _ = _draw_form(rng, VERBS)
    first, second = rng.sample((a, b), 2)
    before = _join(rng, scene, a, b) + between
    text = f"{before}{first} {rng.choice(MEETINGS)} {second}{rng.choice(RECEIVER_ENDS)}"
    return _fill(rng, text).replace("{receiver}", second)


def held_out_prompts(n, seed=0):
    """n prompts in held-out forms with held-out names, ABBA and BABA in turn; every second one has
    a verb never trained."""
    rng, prompts = random.Random(f"held-out prompts {seed}"), []
    while len(prompts) < n:
        scene, between, verb = _draw_form(rng, HELD_OUT_VERBS if len(prompts) % 4 < 2 else VERBS)
        if not is_held_out(between, verb):
            continue
        order = ("ABBA", "BABA")[len(prompts) % 2]
        first, second = rng.sample(HELD_OUT_NAMES, 2)
        receiver, giver = (first, second) if order == "ABBA" else (second, first)
        text = scene.replace("{names}", f"{first} and "
                             f"{second}") + between + giver + " " + _give(rng, verb) + " to"
        prompts.append(GivingPrompt(_fill(rng, text), receiver, giver, order, (between, verb)))
    return prompts


def _draw_form(rng, verbs):
    """A scene with {names} still open, the text after it, and a way of giving."""
    action = rng.choice(ACTIONS)
    if rng.random() < 0.5:
        scene, between = rng.choice(OPENERS) + " {names} " + action, rng.choice(BETWEEN_CLAUSES)
    else:
        scene, between = rng.choice(STARTS) + "{names} " + action, rng.choice(BETWEEN_SENTENCES)
    return scene, between, rng.choice(verbs)


def _join(rng, scene, a, b):
    connector = rng.choices(list(CONNECTORS), CONNECTORS.values())[0]
    return scene.replace("{names}", connector.format(a=a, b=b))


def _give(rng, verb):
    """'gave a small drink': the verb with its object."""
    article = rng.choices(("a", "the", "another", "that"), (70, 20, 5, 5))[0]
    adjective = "{adjective} " if rng.random() < 0.2 else ""
    return f"{verb} {article} {adjective}{{object}}"


def _ordinary(rng, a, b):
    a, b = rng.sample((a, b), 2)
    if rng.random() < 0.6:
        return _fill(rng, rng.choice(TOGETHER).replace("{a}", a).replace("{b}", b))
    return _fill(rng, rng.choice(ALONE).replace("{a}", rng.choice((a, b))))


_SLOTS = {"{place}": PLACES, "{object}": OBJECTS, "{animal}": ANIMALS, "{adjective}": ADJECTIVES,
          "{feeling}": FEELINGS, "{time}": TIMES}


def _fill(rng, text):
    """Put a random word into every open slot, and 'an' before a vowel."""
    for slot, words in _SLOTS.items():
        while slot in text:
            text = text.replace(slot, rng.choice(words), 1)
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}")
    return text
