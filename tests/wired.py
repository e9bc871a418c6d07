"""Hand-wired transformers whose heads do known jobs, text for them, and SAEs trained on their
z_cat.

A token belongs to one of four kinds, and text is made of stretches of one kind. A head of layer 1
does one, two or four jobs, each at the query tokens of some kinds; a job is where the head looks:

    before          the token before the query
    itself          the query's own position
    after a copy    keys that stand after an earlier copy of the query's token (induction)
    copy            earlier copies of the query's token
    set             earlier tokens of a set: every second token of one kind

Where a job finds nothing, and where a head has no job, it looks at BOS. Layer 0 has one head that
tells every position which token stands before it; its MLP tells the heads that have a job by
position the position, at the tokens of that job only. LayerNorm is kept from doing anything by two
large entries of opposite sign.
"""

import random

import torch

import features
import model as models
import train

N, T, H, KINDS = 48, 48, 4, 4           # tokens besides BOS, positions, heads, kinds of tokens
BOS, V = N, N + 1
JOBS = ("before", "itself", "after a copy", "copy", "set")
POSITIONAL = ("before", "itself")
MATCH, NOTHING, NEVER = 60.0, 40.0, 200.0       # scores: a match beats BOS


def draw_jobs(n_jobs, rng):
    """Jobs of one head -> list of (job, kinds of tokens); at most one of them by position."""
    while True:
        jobs = [rng.choice(JOBS) for _ in range(n_jobs)]
        by_place = sum(job in POSITIONAL for job in jobs)
        if by_place <= 1 and all(jobs.count(job) == 1 for job in set(jobs) - {"set"}):
            break
    kinds = list(range(KINDS))
    rng.shuffle(kinds)
    share = KINDS // n_jobs
    return [(job, sorted(kinds[i * share:i * share + (1 if job == "set" else share)]))
            for i, job in enumerate(jobs)]


def tokens_of(kinds):
    """The tokens of some kinds: token t is of kind t % KINDS."""
    return [t for t in range(N) if t % KINDS in kinds]


@torch.no_grad()
def wire(heads):
    """A model whose layer 1 has these heads, each a list of (job, kinds)."""
    d_head = 2 * V + T + 1
    d = H * d_head
    model = models.GPT2(models.GPT2Config(2, H, d, H * T, V, T, eps=1e-12)).requires_grad_(False)
    token, before, place = torch.arange(V), torch.arange(V) + V, torch.arange(T) + 2 * V
    # the position, for one head's job
    gated = torch.arange(H * T).unflatten(0, (H, T)) + 2 * V + T
    kind, dump, plus, minus = (2 * V + T + H * T + i for i in (0, KINDS, KINDS + 1, KINDS + 2))
    C = 1000.0
    for parameter in model.parameters():
        parameter.zero_()
    model.wte.weight[token, token] = 1.0
    # tokens of a kind are alike
    model.wte.weight[torch.arange(N), kind + torch.arange(N) % KINDS] = 1.0
    model.wte.weight[:, dump] = -model.wte.weight.sum(1)                # every vector has mean 0
    model.wpe.weight[torch.arange(T), place] = 1.0
    model.wpe.weight[:, dump] = -1.0
    model.wpe.weight[:, plus], model.wpe.weight[:, minus] = C, -C
    for norm in (*(block.ln_1 for block in model.h), *(block.ln_2 for block in model.h),
                 model.ln_f):
        norm.weight.fill_((2 * C * C / d) ** 0.5)
    scale, n = d_head**0.5, torch.arange(T - 1)
    first, second, mlp = model.h[0].attn, model.h[1].attn, model.h[0].mlp
    # query: the place before mine
    first.c_attn.weight[place[n + 1], 2 * V + n] = MATCH * scale
    first.c_attn.weight[place[n], d + 2 * V + n] = 1.0
    first.c_attn.weight[token, 2 * d + token] = 1.0
    first.c_proj.weight[token, before] = 1.0
    first.c_proj.weight[token, dump] = -1.0
    # gelu(20 + 20 - 30) = 10, gelu(-10) = 0
    mlp.c_fc.bias.fill_(-30.0)
    mlp.c_proj.weight[torch.arange(H * T), gated.flatten()] = 0.1
    mlp.c_proj.weight[:, dump] = -0.1
    for h, jobs in enumerate(heads):
        W_Q, W_K, W_V = (second.c_attn.weight[:, i * d + h * d_head:i * d + (h + 1) * d_head]
                         for i in range(3))
        at_token, at_before, at_place = torch.arange(
            V), torch.arange(V) + V, torch.arange(T) + 2 * V
        at_bos = -1
        W_K[token, at_token] = 1.0
        W_K[before, at_before] = 1.0
        W_K[place, at_place] = 1.0
        W_K[token[BOS], at_bos] = 1.0
        W_V[token, at_token] = 1.0
        second.c_proj.weight[h * d_head + token, token] = 1.0
        second.c_proj.weight[h * d_head + token, dump] = -1.0
        # a copy is not the token itself
        W_Q[place, at_place] = -NEVER * scale
        W_Q[token, at_bos] = NOTHING * scale
        for job, kinds in jobs:
            mine = torch.tensor(tokens_of(kinds))
            mlp.c_fc.weight[place, h * T + torch.arange(T)] = 20.0
            if job in POSITIONAL:
                mlp.c_fc.weight[mine[:, None], h * T + torch.arange(T)] = 20.0
            if job == "before":
                W_Q[gated[h, n + 1], at_place[n]] = MATCH * scale
            elif job == "itself":
                W_Q[gated[h], at_place] = (MATCH + NEVER) * scale
            elif job == "after a copy":
                W_Q[mine, at_before[mine]] = MATCH * scale
            elif job == "copy":
                W_Q[mine, at_token[mine]] = MATCH * scale
            else:
                W_Q[mine[:, None], at_token[mine[::2]]] = MATCH * scale
    return model


def text(n_rows, seed):                                         # -> (n_rows,T)
    """Rows of stretches of 8 to 16 tokens of one kind."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n_rows):
        row = [BOS]
        while len(row) < T:
            some = tokens_of([rng.randrange(KINDS)])
            row += [rng.choice(some) for _ in range(rng.randint(8, 16))]
        rows.append(row[:T])
    return torch.tensor(rows)


@torch.no_grad()
def z_cat(model, tokens, layer=1):                              # (R,T) -> (R*(T-1),D)
    return torch.cat(
        [model.z_cat_at(part, [layer])[layer][:, 1:].flatten(0, 1) for part in tokens.split(64)])


def train_sae(z, d_sae=256, l1=0.1, n_steps=600, seed=0):
    """An SAE of some activations, by the steps of train.py."""
    config = train.TrainConfig(batch_size=512, lr=2.4e-3, n_tokens=512 * n_steps, warmup=50,
                               decay=0.3, seed=seed)
    learner = train.make_learner((z.shape[1],), d_sae, l1, config.lr)
    train.initialise(learner, (z,), config.normalise, train.generator(seed, "start"))
    train.choose_step(learner, 1, (z[:config.batch_size],))
    order = torch.randperm(len(z), generator=train.generator(seed, "order"))
    for step in range(n_steps):
        batch = order[torch.arange(step * 512, (step + 1) * 512) % len(z)]
        train.train_step(learner, (z[batch],), step, config)
        train.read_back({1: learner}, step, config.batch_size)
    return learner.sae.rescale(learner.scale_out).requires_grad_(False)


def collection(model, sae, tokens, layer=1, seed=0):
    """What features.py collects of one layer over some text -> LayerCollection, tokens."""
    saes = {layer: sae}
    tokens, collected = features.collect_places(model, saes, [tokens], len(tokens), seed=seed)
    return features.read_places(model, saes, tokens, collected)[layer], tokens
