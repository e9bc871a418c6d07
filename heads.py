"""What every attention head does: a census of roles, and how many heads are polysemantic, which the
paper judges by eye.

    python heads.py                         all heads of the shipped model

For every head, some features are looked at: the 10 that lie in it most by decoder weight, as the
paper does, the top 25 and the top 50; and, since these need not be what the head does most, 50
features drawn in proportion to what the head gathers for them. Features that read alike have the
same role, and a head whose features have several roles is polysemantic.

    gathered     what a head gathers for a feature: the DFA of the head's strongest source (position
                 0 left out; 0 if negative), summed over the text
    profile      where this is read: from the token itself, the token before, a token after a copy
                 of the current one, or a copy, in some shares; from the last two is taken off what
                 chance gives. The rest is told by the tokens that the feature fires on and reads
                 through the head, and by the direction that it writes
    similarity   of two features: the overlap of these shares, plus the overlap of the rest times
                 how much these tokens and directions are alike
    roles        groups of features, each with a similarity of 0.5 or more to the leader of its
                 group; counted as 1 / (probability that two features share one)

The threshold of similarity was chosen on hand-wired heads whose jobs are known
(tests/measured/calibrate.py). What is read here is what features.py collected; where that is
missing, it is collected first. Written to <out>/<model>/heads/, and for the page of features.py to
<out>/<model>/features/heads.js.

Shapes: R rows, T positions (q query, k key/source), H heads, D = H*d_head, d_sae; n places, m
features; V token ids, up to the largest in the text.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import pages
from data.errors import UserError, run
from data.figures import plot_census
from data.files import write_json
from data.flags import field, parse_flags
from data.tokens import fuzzy_classes, is_after_copy, is_copy
from direct import head_weights
from features import (MIN_PLACES, CollectionConfig, activation_share, load_or_collect,
                      share_by_chance)
from study import begin, finish, reported

CHOICES = {"top 10": 10, "top 25": 25, "top 50": 50, "50 drawn": 50}    # how many features each has
TOP, DRAWN = "top 25", "50 drawn"           # the two that are told in words
SIMILARITY_THRESHOLD = 0.5                  # to a role's leader, from which on a feature has it
POLYSEMANTIC_ABOVE = 1.5                    # roles, as `number_of_roles` counts them: a convention,
                                            # half way between one and two


# ---- how a feature reads and writes through a head ----

RELATIONS = ("itself", "the token before", "a token after a copy", "a copy")


class Profiles(NamedTuple):
    """How m features read from and write to one head."""
    relations: Tensor       # (m,len(RELATIONS)) share of what the head gathers that is read there
    fire: Tensor            # (m,d_model) embeddings of the tokens they fire on, summed over the
                            # sample's places, each times what the head gathers there
    read: Tensor            # (m,d_model) the same of the tokens read
    write: Tensor           # (m,d_model) W_dec[i] at the head @ W_O


class HeadPlaces(NamedTuple):
    """The sample of a layer's places, as one head has it."""
    row: Tensor             # (n,)
    q: Tensor               # (n,)
    feature: Tensor         # (n,)
    source: Tensor          # (n,) the head's strongest source
    gathered: Tensor        # (n,) its DFA, 0 if negative, times the places this one stands for


def places_of_head(of_layer, head):                         # LayerCollection -> HeadPlaces
    """Where one head reads, for every place of the sample."""
    places = of_layer.collected.sample
    # weight is the activation that a place stands for; divided by the place's own activation, it is
    # the number of such places
    n_represented = of_layer.collected.weight / places.f
    value = of_layer.reads.head_value[:, head].clamp_min(0)
    source = of_layer.reads.head_source[:, head].long()
    return HeadPlaces(places.row, places.q, places.feature, source, n_represented * value)


def relation_shares(of_layer, places, classes, seed=0):     # -> (d_sae,len(RELATIONS))
    """How much of what a head gathers for each feature is read in each relation.

    A place counts for the first relation that holds, in the order of RELATIONS. From the shares of
    the two relations to copies chance is taken off, since frequent tokens have copies everywhere.
    Let the part `further` be read from further back than the token before, and let the relation
    hold there by chance at a rate p: how often it holds at the same distance in the feature's other
    places. If it is meant in a part t of all, then

        share = t + (further - t) p,        so      t = (share - further p) / (1 - p)
    """
    d_sae = len(of_layer.collected.n)
    feature, q, k, gathered = places.feature, places.q, places.source, places.gathered

    def after_copy(row, q, k):
        return (k < q - 1) & is_after_copy(classes, row, q, k)

    def copy(row, q, k):
        return (k < q - 1) & is_copy(classes, row, q, k) & ~after_copy(row, q, k)

    shares = [activation_share(feature, gathered, k == q, d_sae),
              activation_share(feature, gathered, k == q - 1, d_sae)]
    is_further = k < q - 1
    further = activation_share(feature, gathered, is_further, d_sae)
    for relation in (after_copy, copy):
        share = activation_share(feature, gathered, relation(places.row, q, k), d_sae)
        by_chance, n_tries = share_by_chance(places, k, relation, seed)
        # places without a possible try say nothing about chance
        tried = gathered * (is_further & (n_tries > 0))
        p = activation_share(feature, tried, by_chance, d_sae).nan_to_num(0.0)
        shares.append(((share - further * p) / (1 - p)).clamp_min(0))
    # NaN: the head gathers nothing for the feature, or chance explains all; then no share is read
    # in the relation
    return torch.stack(shares, 1).nan_to_num(0.0).float()


def profiles(features, relations, places, tokens, embedding, write):    # (m,) -> Profiles
    """Profiles of some features, as far as one head gathers their activation. The sums of
    embeddings are over all places of a feature, whatever the relation, and of the sums only the
    direction is used.

    relations (d_sae,len(RELATIONS)), embedding (V,d_model), write (d_sae,d_model).
    """
    index = torch.full((len(relations),), -1)               # of each feature among these, or -1
    index[features] = torch.arange(len(features))
    is_of_these = index[places.feature] >= 0
    owner = index[places.feature[is_of_these]]
    row = places.row[is_of_these]
    gathered = places.gathered[is_of_these, None]

    def sum_of_embeddings(position):
        token = tokens[row, position[is_of_these]].long()
        total = torch.zeros(len(features), embedding.shape[1])
        return total.index_add_(0, owner, gathered * embedding[token])

    return Profiles(relations[features], sum_of_embeddings(places.q),
                    sum_of_embeddings(places.source), write[features])


def token_embeddings(model, tokens):                        # -> (V,d_model)
    """Each token's embedding, less the mean over the text, as unit vectors on the CPU."""
    vocabulary = torch.arange(int(tokens.max()) + 1, device=next(model.parameters()).device)
    embedding = torch.cat([model.embed_parts(part[:, None])["embedding"][:, 0]
                           for part in vocabulary.split(4096)])
    times = torch.bincount(tokens.flatten().long(), minlength=len(embedding)).to(embedding)
    return F.normalize(embedding - times @ embedding / times.sum(), dim=1).cpu()


# ---- roles ----


def similarity(p):                                          # Profiles -> (m,m)
    """sum over relations of min(share_i, share_j), plus min(rest_i, rest_j) * content.

    A relation is the same whatever the tokens are: all "X is next" features have one role. The rest
    is what is read in no relation. It counts as far as the two features fire on, read and write
    alike: content is the mean of three cosines, negative ones being 0.
    """
    shared = torch.minimum(p.relations[:, None], p.relations).sum(-1)
    rest = (1 - p.relations.sum(1)).clamp_min(0)
    content = 0
    for vectors in (p.fire, p.read, p.write):
        unit = F.normalize(vectors, dim=1)
        content = content + (unit @ unit.T).clamp_min(0) / 3
    return shared + torch.minimum(rest[:, None], rest) * content


def group_roles(similarities, threshold=SIMILARITY_THRESHOLD):      # (m,m) -> list of lists
    """Greedy: group the feature with most neighbours and its neighbours; repeat. So the largest
    group comes first. A group lists places in 0 to m-1."""
    near = similarities >= threshold
    near.fill_diagonal_(True)
    left = torch.ones(len(near), dtype=torch.bool)
    groups = []
    while left.any():
        n_neighbours = (near & left).sum(1) * left
        leader = int(n_neighbours.argmax())
        groups.append((near[leader] & left).nonzero()[:, 0].tolist())
        left[groups[-1]] = False
    return groups


def number_of_roles(groups):
    """An effective number: 1 / (probability that two different features share a role).

    n large groups of equal size count as about n, and more features of the same kinds do not raise
    it. It is an estimate: where few features share a role it exceeds the number of features (ten
    with one pair: 45), and where none do it is infinite.
    """
    m = sum(len(group) for group in groups)
    n_pairs = sum(len(group) * (len(group) - 1) for group in groups)
    return m * (m - 1) / n_pairs if n_pairs else float("inf")


# ---- the census ----


class HeadFeatures(NamedTuple):
    """The features of one head that are looked at."""
    places: HeadPlaces
    weight: Tensor          # (d_sae,) share of every feature's decoder that lies in the head
    chosen: dict            # {choice: (m,) features}; fewer than asked for if it has fewer
    profiles: dict          # {choice: their Profiles}


def features_of_heads(model, sae, layer, of_layer, tokens, classes, seed=0):
    """The features that are looked at of each head of a layer -> list of HeadFeatures.

    Only features active at MIN_PLACES places or more are among them.
    """
    weights = head_weights(sae.W_dec, model.config.n_heads).cpu()
    common = of_layer.collected.n >= MIN_PLACES
    embedding = token_embeddings(model, tokens)
    W_O = model.head_matrices(layer).W_O.cpu()              # (H,d_head,d_model)
    W_dec = sae.W_dec.cpu().unflatten(1, W_O.shape[:2])     # (d_sae,H,d_head)
    heads = []
    for head in range(model.config.n_heads):
        places = places_of_head(of_layer, head)
        top = top_features(weights[:, head], common)
        drawn = drawn_features(places, common, seed * 1000 + head)
        chosen = {choice: drawn if choice == DRAWN else top[:n] for choice, n in CHOICES.items()}

        relations = relation_shares(of_layer, places, classes, seed)
        write = W_dec[:, head] @ W_O[head]                  # (d_sae,d_model)
        by_choice = {}
        for choice, features in chosen.items():
            by_choice[choice] = profiles(features, relations, places, tokens, embedding, write)
        heads.append(HeadFeatures(places, weights[:, head], chosen, by_choice))
    return heads


def roles_of_head(of_head, threshold):                      # HeadFeatures -> {choice: groups}
    """The roles among each choice of features; see `group_roles`."""
    return {choice: group_roles(similarity(p), threshold)
            for choice, p in of_head.profiles.items()}


def census_of_layer(model, sae, layer, of_layer, tokens, classes, threshold=SIMILARITY_THRESHOLD,
                    seed=0):                                # -> list of dicts, one a head
    """What each head of a layer does.

    "features": the top 50 by weight. "roles": {choice: number of roles}, None where there are fewer
    features than the choice has. "top" and "drawn" say more of the choices TOP and DRAWN, see
    `describe_choice`.
    """
    text_share = torch.bincount(tokens.flatten().long()).double() / tokens.numel()      # (V,)
    census = []
    heads = features_of_heads(model, sae, layer, of_layer, tokens, classes, seed)
    for i, of_head in enumerate(heads):
        groups = roles_of_head(of_head, threshold)
        roles = {}
        for choice, features in of_head.chosen.items():
            is_full = len(features) == CHOICES[choice]
            roles[choice] = number_of_roles(groups[choice]) if is_full else None
        census.append({"layer": layer, "head": i, "name": f"{layer}.{i}",
                       "features": of_head.chosen["top 50"].tolist(), "roles": roles,
                       "top": describe_choice(of_head, TOP, groups[TOP], tokens, text_share),
                       "drawn": describe_choice(of_head, DRAWN, groups[DRAWN], tokens, text_share)})
    return census


def top_features(weight, common, n=50):                     # (d_sae,), (d_sae,) bool -> (n,)
    """The features that lie in a head most, n at most."""
    order = torch.where(common, weight, -1).argsort(descending=True)
    return order[:min(n, int(common.sum()))]


def drawn_features(places, common, seed, n=CHOICES[DRAWN]):     # HeadPlaces -> (n,) at most
    """Features drawn without replacement, in proportion to what the head gathers for them."""
    gathered = torch.bincount(places.feature, places.gathered, minlength=len(common)) * common
    n = min(n, int((gathered > 0).sum()))
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    return torch.multinomial(gathered, n, generator=torch.Generator().manual_seed(seed))


def describe_choice(of_head, choice, groups, tokens, text_share):       # HeadFeatures -> dict
    """One choice of a head's features as plain numbers: their weights in it; "relations", for each
    relation its share, averaged over the features; "groups", their roles, largest first, with the
    tokens that they fire on and read. text_share (V,): how often each token stands in the text."""
    features = of_head.chosen[choice]
    relations = of_head.profiles[choice].relations
    described = []
    for group in groups:
        is_of_group = torch.isin(of_head.places.feature, features[group])
        places = HeadPlaces(*(column[is_of_group] for column in of_head.places))
        described.append({"features": features[group].tolist(),
                          "relations": relations[group].mean(0).tolist(),
                          "at": distinctive_tokens(places, places.q, tokens, text_share),
                          "reads": distinctive_tokens(places, places.source, tokens, text_share)})
    return {"features": features.tolist(), "weights": of_head.weight[features].tolist(),
            "relations": (relations.sum(0) / max(len(features), 1)).tolist(),
            "groups": described}


def distinctive_tokens(places, position, tokens, text_share, n=3):      # -> token ids
    """The tokens at the given positions of some places that stand out from the text: with the
    largest p log(p / text_share), p by what the head gathers there."""
    there = tokens[places.row, position].long()
    gathered = torch.bincount(there, places.gathered.double(), minlength=len(text_share))
    p = gathered / gathered.sum()
    score = torch.where(p > text_share, p * (p / text_share).log(), 0.0)
    return [i for i in score.argsort(descending=True)[:n].tolist() if score[i] > 0]


def is_polysemantic(head, choice):          # head of the census -> bool, None if it cannot be told
    """Whether the chosen features of a head have several roles."""
    n_roles = head["roles"][choice]
    return None if n_roles is None else n_roles > POLYSEMANTIC_ABOVE


def count_polysemantic(census):                             # -> {choice: {...}}, {verdict: number}
    """By each choice of features, how many heads are polysemantic; and how many are so by all
    choices that can tell, by none, by some."""
    by_choice = {}
    for choice in CHOICES:
        verdicts = [is_polysemantic(head, choice) for head in census]
        known = [verdict for verdict in verdicts if verdict is not None]
        by_choice[choice] = {"polysemantic": sum(known), "heads": len(known)}
    agreement = {"by every choice": 0, "by none": 0, "by some": 0}
    for head in census:
        known = {is_polysemantic(head, choice) for choice in CHOICES} - {None}
        if known == {True}:
            agreement["by every choice"] += 1
        elif known == {False}:
            agreement["by none"] += 1
        elif known:
            agreement["by some"] += 1
    return by_choice, agreement


# ---- the program ----


@dataclass(frozen=True)
class HeadsConfig(CollectionConfig):
    similarity: float = field(SIMILARITY_THRESHOLD, "to the leader of a role, from which on a "
                              "feature has it, as tests/measured/calibrate.py chose it")


def main():
    config = parse_flags(HeadsConfig, __doc__)
    if not 0 < config.similarity <= 1:
        raise UserError(f"--similarity must be above 0 and at most 1, not {config.similarity}.")
    study = begin(config, "heads")
    collection = load_or_collect(study)
    classes = fuzzy_classes(study.tokenizer)[collection.tokens.long()]
    census = []
    for layer, of_layer in collection.layers.items():
        census += census_of_layer(study.model, study.saes[layer], layer, of_layer,
                                  collection.tokens, classes, config.similarity, config.seed)
    report_census(study, census)
    write_page(study, census)
    finish(study)


# ---- the report ----


def report_census(study, census):
    """Roles of every head and two lines about it; how many heads are polysemantic."""
    print("\nroles of the features that lie in each head most, and of 50 drawn by what it gathers")
    print("head " + "".join(f"{choice:>10}" for choice in CHOICES))
    for head in census:
        roles = [roles_text(head, choice) for choice in CHOICES]
        print(f"{head['name']:5}" + "".join(f"{text:>10}" for text in roles))
    print(f"\nwhat they read: the {TOP}, and below them the {DRAWN}")
    for head in census:
        print(f"{head['name']:5} {summary(head['top'], study.tokenizer)}")
        print(f"      {summary(head['drawn'], study.tokenizer)}")
    by_choice, agreement = count_polysemantic(census)
    print(f"\npolysemantic heads (more than {POLYSEMANTIC_ABOVE} roles; similarity "
          f"{study.config.similarity:g})")
    for choice, count in by_choice.items():
        print(f"{choice:10} {count['polysemantic']} of {count['heads']}")
    print(", ".join(f"{verdict} {number}" for verdict, number in agreement.items()))
    reported(study, "14 of 144 heads plausibly monosemantic, so at least 90% polysemantic, judged "
             "by eye on the top 10 features of each")
    heads = [head | {"roles": {choice: finite(n) for choice, n in head["roles"].items()}}
             for head in census]
    write_json(study.folder / "census.json",
               {"similarity_threshold": study.config.similarity,
                "polysemantic_above": POLYSEMANTIC_ABOVE, "polysemantic": by_choice,
                "agreement": agreement, "heads": heads})
    plot_census(census, CHOICES, POLYSEMANTIC_ABOVE, study.folder / "census.png")


def finite(x):
    """JSON has no infinity."""
    return "infinite" if x == float("inf") else x


def roles_text(head, choice):               # head of the census -> text
    """Its number of roles; infinite is written as more than there are features."""
    n_roles = head["roles"][choice]
    if n_roles is None:
        return "n/a"
    return f"> {CHOICES[choice]}" if n_roles == float("inf") else f"{n_roles:.1f}"


def summary(described, tokenizer):          # what `describe_choice` returns -> text
    """A line about some features of a head, built from what was measured."""
    if not described["features"]:
        return "no features that are active often enough"
    shares = [f"{share:.0%} {relation}"
              for share, relation in zip(described["relations"], RELATIONS) if share >= 0.05]
    elsewhere = round(1 - sum(described["relations"]), 2) + 0.0   # and not -0%
    groups = []
    for group in described["groups"][:3]:
        share, what = max(zip(group["relations"], RELATIONS))
        if share < 0.5:
            what = f"{quoted(group['reads'], tokenizer)} at {quoted(group['at'], tokenizer)}"
        groups.append(f"{len(group['features'])} read {what}")
    weights = described["weights"]
    return (f"reads {', '.join([*shares, f'{elsewhere:.0%} elsewhere'])}. Roles: "
            f"{'; '.join(groups)}. They lie in it by {min(weights):.0%} to {max(weights):.0%}")


def quoted(tokens, tokenizer):
    """Tokens as text in quotation marks."""
    return " ".join(repr(tokenizer.decode([i])) for i in tokens) or "nothing that stands out"


def write_page(study, census):
    """The heads for the page of features.py."""
    about = ("Number of roles among the features that lie most in each head, and among 50 drawn by "
             "what it gathers: 1 / (probability that two of them share a role).")
    heads = [{"name": head["name"], "roles": [roles_text(head, choice) for choice in CHOICES],
              "text": {TOP: summary(head["top"], study.tokenizer),
                       DRAWN: summary(head["drawn"], study.tokenizer)}} for head in census]
    content = {"about": about, "choices": list(CHOICES), "heads": heads}
    pages.write_script(study.folder.parent / "features" / "heads.js", "receive_heads", content)


if __name__ == "__main__":
    run(main)
