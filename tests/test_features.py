"""features.py, data/strongest.py and the dashboards: brute-force counts, and hand-wired heads and
features whose families are known."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

import direct as A
import features as F
import model as models
import sae as S
import heads
import wired as W
from conftest import GEMMA_SHAPES, ROOT, program, random_gemma
from data import strongest as keep, pages
from data.strongest import Entries
from data.tokens import is_copy

# ---- what was read ----


@pytest.fixture(scope="module")
def collected(tiny):
    """Two layers of tiny over 20 rows of random tokens that repeat."""
    saes = {layer: S.SAE.load(ROOT / "data" / "tiny" / f"L{layer}") for layer in (1, 3)}
    g = torch.Generator().manual_seed(0)
    half = torch.randint(4000, (20, 20), generator=g)
    stream = torch.cat([torch.full((20, 1), 4095), half, half], 1)
    tokens, kept = F.collect_places(tiny, saes, [stream], 20, n_places=20)
    return tiny, saes, tokens, kept, F.read_places(tiny, saes, tokens, kept)


def test_sources_equal_those_of_dfa(collected):
    model, saes, tokens, kept, looked = collected
    for layer in saes:
        sample, reads = kept[layer].sample, looked[layer].reads
        for n in range(0, len(sample.f), len(sample.f) // 25):
            row, q, i = int(sample.row[n]), int(sample.q[n]), int(sample.feature[n])
            _, cache = model(tokens[row:row + 1].long(), keep=(layer,))
            v = cache[layer].v - model.value_bias(layer).unflatten(0, (4, -1))
            # (H,k)
            moved = A.dfa(cache[layer].pattern, v, saes[layer].W_enc[:, i])[0, :, q]
            if q > 1:
                assert int(reads.source[n]) == 1 + int(moved.sum(0)[1:q].argmax()), \
                    "BOS and q are no sources"
            assert reads.head_source[n].tolist() == (1 + moved[:, 1:q + 1].argmax(-1)).tolist()
            torch.testing.assert_close(reads.head_value[n], moved[:, 1:q + 1].max(-1).values,
                                       atol=1e-5, rtol=1e-4)


def test_what_a_dashboard_shows_sums_to_the_activation(collected):
    model, saes, tokens, kept, looked = collected
    for layer, sae in saes.items():
        top, shown = kept[layer].top, looked[layer].top
        constant = A.feature_bias(sae) + model.value_bias(layer) @ sae.W_enc
        torch.testing.assert_close(
            shown.total.sum(1) + constant[top.feature], top.f, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(shown.window[:, F.BEFORE].float(), top.f, atol=1e-3, rtol=1e-3)
        few = (top.q < F.N_SOURCES).nonzero()[:, 0]     # all their sources are among those kept
        assert len(few) > 20
        there = (shown.sources[few] >= 0)[..., None]
        torch.testing.assert_close((shown.by_head[few] * there).sum(1), shown.total[few], atol=1e-4,
                                   rtol=1e-4)


# ---- families ----


def test_the_context_needed_by_hand():
    #                        n = 1    2    4    8    16   32
    cut = torch.tensor([[0.9, 0.9, 0.9, 0.9, 0.9, 0.9], [0.1, 0.2, 0.6, 0.7, 0.9, 1.0],
                        [0.1, 0.1, 0.1, 0.1, 0.1, 0.2], [0.6, 0.1, 0.6, 0.6, 0.6, 0.6],
                        [0.1, 0.1, 0.1, 0.9, math.nan, math.nan], [0.0, 0.0, 0.0, 0.0, 0.5, 0.5]])
    needed, unstable = F.context_needed(cut)
    assert needed.tolist() == [0, 2, 6, 2, 3, 4]
    assert unstable.tolist() == [False, False, False, True, False, False]
    short_rows = torch.tensor([[0.1, 0.1, 0.1, 0.1, math.nan, math.nan]])
    assert F.context_needed(short_rows)[0].tolist() == [6], "more than was tried"
    assert F.context_needed(torch.full((1, 6), math.nan))[0].tolist() == [-1], "never measured"
    n = torch.full((6,), 100)
    context = F.ContextKept(cut, torch.full((6, 6), 100.0))
    after_copy = torch.tensor([0.1, 0.1, 0.9, 0.4, 0.6, 0.6])
    chance = torch.tensor([0.0, 0.0, 0.2, 0.0, 0.3, 0.0])
    names = [F.FAMILIES[i] for i in F.classify(after_copy, chance, context, n)]
    assert names == ["current token", "short-range", "after a copy", "unstable", "short-range",
                     "after a copy"], "twice what chance gives is too little"
    n[:2] = torch.tensor([3, 0])
    assert F.classify(after_copy, chance, context, n).tolist()[:2] == [F.TOO_RARE, -1]


def test_chance_is_what_the_same_distances_give_elsewhere():
    """Three places of a feature; sources 2 back. In the rows 0 and 1 the token 2 back is a copy."""
    classes = torch.tensor([[-1, 5, 6, 5], [-1, 7, 8, 7], [-1, 1, 2, 3]])
    entries = Entries(torch.arange(3), torch.full((3,), 3), torch.zeros(3, dtype=torch.int64),
                      torch.ones(3))
    copy = lambda row, q, k: is_copy(classes, row, q, k)
    hits, tries = F.share_by_chance(entries, torch.ones(3, dtype=torch.int64), copy, 0,
                                    n_tries=4000)
    assert (tries == 4000).all()
    torch.testing.assert_close(hits, torch.tensor([0.5, 0.5, 1.0]), atol=0.03, rtol=0)
    _, tries = F.share_by_chance(entries.pick(slice(1)), torch.ones(1, dtype=torch.int64), copy, 0)
    assert not tries.any(), "one place has no other to compare with"


def test_a_source_at_bos_is_not_read_after_a_copy():
    """In every row 5 comes again at 4, and the source is 2: a token in row 0, BOS in row 1."""
    tokens = torch.tensor([[9, 5, 6, 7, 5], [9, 5, 9, 7, 5]])
    classes = tokens.masked_fill(tokens == 9, -1)
    places = Entries(torch.arange(2), torch.full((2,), 4), torch.arange(2), torch.ones(2))
    collected = SimpleNamespace(sample=places, n=torch.ones(2), weight=torch.ones(2))
    reads = SimpleNamespace(source=torch.full((2,), 2))
    share, _, X, _ = F.after_copy_shares(collected, reads, tokens, classes)
    assert share.tolist() == [1.0, 0.0] and X.tolist() == [6, -1]


TOPIC, OTHER = range(0, 8), range(8, 40)


def families_model():
    """One layer of three heads with vectors of one-hot tokens: head 0 the token before, head 1 the
    token itself, head 2 the mean over the context, in which BOS weighs as much as 12 tokens."""
    V, T, H = 42, 64, 3
    d_head = V + T + 1
    d, C, bos = H * d_head, 1000.0, 41
    model = models.GPT2(models.GPT2Config(1, H, d, 4, V, T, eps=1e-12)).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        token, place = torch.arange(V), torch.arange(T) + V
        dump, plus, minus = V + T, V + T + 1, V + T + 2
        model.wte.weight[token, token], model.wte.weight[:, dump] = 1.0, -1.0
        model.wpe.weight[torch.arange(T), place], model.wpe.weight[:, dump] = 1.0, -1.0
        model.wpe.weight[:, plus], model.wpe.weight[:, minus] = C, -C
        model.h[0].ln_1.weight.fill_((2 * C * C / d) ** 0.5)
        W = model.h[0].attn.c_attn.weight
        n, scale = torch.arange(T), d_head**0.5
        for h in range(H):
            W[token, 2 * d + h * d_head + token] = 1.0
            W[place, d + h * d_head + V + n] = 1.0
        W[place[1:], V + n[:-1]] = 50 * scale
        W[place, d_head + V + n] = 50 * scale
        W[plus, 2 * d_head + V + T] = scale / C
        W[token[bos], d + 2 * d_head + V + T] = math.log(12)
    sae = S.SAE(d, 4).requires_grad_(False)
    sae.W_enc.zero_(), sae.W_dec.fill_(1.0), S.normalise_decoder(sae)
    sae.W_enc[[10, d_head + 11], 0] = 1.0                       # 0: token 11 after token 10
    # 1: the topic's share of the context
    sae.W_enc[2 * d_head + torch.tensor(TOPIC), 1] = 1.0
    sae.W_enc[d_head + 20, 2] = 1.0                             # 2: token 20
    sae.b_enc[:] = torch.tensor([-1.5, -0.45, -0.5, -9.0])
    return model, sae


def test_a_bigram_is_short_range_a_topic_long_range_a_token_current_and_the_rest_not_live():
    model, sae = families_model()
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(8, 40, (600, 64), generator=g)
    topical = torch.randint(0, 8, (600, 64), generator=g)
    of_topic = torch.where(torch.rand(600, 64, generator=g) < 0.85, topical, rows)
    rows = torch.where(torch.rand(600, 1, generator=g) < 0.5, of_topic, rows)
    bigram = torch.rand(600, 64, generator=g) < 0.08
    rows[:, :-1][bigram[:, 1:]] = 10
    rows[bigram] = 11
    rows[:, 0] = 41
    classes = torch.where(rows == 41, -1, rows)
    of_layer, tokens = W.collection(model, sae, rows, layer=0)
    families = F.find_families(of_layer, tokens, classes)
    names = [F.FAMILIES[i] if i >= 0 else "dead" for i in families.family.tolist()]
    assert names == ["short-range", "long-range", "current token", "dead"]
    kept = of_layer.context.share
    exactly_two = torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(kept[0], exactly_two, atol=0.02, rtol=0)
    torch.testing.assert_close(kept[2], torch.ones(6, dtype=torch.float64), atol=0.02, rtol=0)
    assert kept[1, 3] < 0.1 and kept[1, 5] > 0.5, "8 tokens cannot outweigh BOS"


def test_gemma_goes_through_all_of_it(tmp_path):
    """Rotary positions, shared keys and values, norms behind the layers, a window: sums still
    hold."""
    random_gemma(tmp_path, **GEMMA_SHAPES["2"])
    model = models.load_model(tmp_path)
    g = torch.Generator().manual_seed(0)
    saes = {layer: S.SAE(64, 90, generator=g).requires_grad_(False) for layer in (1, 2)}
    rows = torch.cat([torch.full((40, 1), 2), torch.randint(3, 120, (40, 35), generator=g)], 1)
    tokens, kept = F.collect_places(model, saes, [rows], 40, n_places=30)
    by_layer = F.read_places(model, saes, tokens, kept)
    for layer, sae in saes.items():
        of_layer = by_layer[layer]
        top = of_layer.collected.top
        pre = of_layer.top.total.sum(1) + A.feature_bias(sae)[top.feature]
        torch.testing.assert_close(pre, top.f, atol=1e-4, rtol=1e-4)
        assert F.find_families(of_layer, tokens, rows).family.max() >= 0
        census = heads.census_of_layer(model, sae, layer, of_layer, tokens, rows)
        assert len(census) == 4 and all(head["roles"]["top 10"] >= 1 for head in census)


def test_a_collection_is_stored_whole_and_read_back(collected, tmp_path):
    model, saes, tokens, kept, by_layer = collected
    before = F.Collection(tokens, by_layer)
    settings = {part: {"seed": "0", "sae": str(part)} for part in ("tokens", *saes)}
    F.save_collection(before, tmp_path, settings)
    after = F.load_collection(tmp_path, saes, settings)
    other_text = settings | {"tokens": {"seed": "1"}}
    assert F.load_collection(tmp_path, saes, other_text) is None, "made from another text"
    first, *_, last = saes
    other_sae = settings | {last: {"seed": "0", "sae": "retrained"}}
    assert F.load_collection(tmp_path, saes, other_sae) is None, "made with another SAE"
    alone = F.load_collection(tmp_path, {first: saes[first]}, other_sae)
    assert list(alone.layers) == [first], "one layer's part does not depend on other layers' SAEs"
    assert torch.equal(before.tokens, after.tokens)
    for layer in saes:
        ours, read = F.flattened(before.layers[layer]), F.flattened(after.layers[layer])
        assert ours.keys() == read.keys() and len(ours) == 5 + 12 + 3 + 4 + 4 + 2
        for name in ours:
            assert torch.equal(ours[name].nan_to_num(-7), read[name].nan_to_num(-7)), name
    path = F.collection_path(tmp_path, last)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:5], b"", b"<html>"):
        path.write_bytes(damaged)
        assert F.load_collection(tmp_path, saes, settings) is None, "it is made anew"


# ---- the program ----


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    done = program("features", "--saes", "data/tiny", "--layers", "1,3", "--n-tokens", 8_000,
                   "--sample", 4, "--out", out)
    assert done.returncode == 0, done.stderr
    return done.stdout, out / "tiny" / "features"


def page_data(page):
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def chunk(path):
    layer, number, content = re.fullmatch(r"receive\((\d+),(\d+),(.*)\);\n",
                                          path.read_text()).groups()
    return json.loads(content)


def test_the_program_writes_tables_json_figures_and_pages(written):
    printed, folder = written
    for words in ("features by family", "long-range", "4 of", "to fill in by eye"):
        assert words in printed, words
    for name in ("families.json", "families.png", "index.html", "sample.csv", "config.json",
                 "L1/features.json", "L3/features.json", "collection/L1.safetensors"):
        assert (folder / name).stat().st_size > 0
    assert len((folder / "sample.csv").read_text().splitlines()) == 1 + 2 * 4


@pytest.mark.parametrize("change", [
    {"corpus": "book.txt"}, {"held_out_share": 0.1}, {"n_tokens": 5000}, {"n_places": 11},
    {"seed": 1}, {"model": "gpt2"}], ids=str)
def test_what_was_collected_with_another_setting_is_not_read(change):
    def settings(**change):
        study = SimpleNamespace(config=F.CollectionConfig(**change), model=torch.nn.Linear(2, 2),
                                saes={0: S.SAE(4, 8)})
        torch.nn.init.ones_(study.model.weight)
        torch.nn.init.zeros_(study.model.bias)
        return F.collection_settings(study)["tokens"]

    assert settings() == settings() != settings(**change)


def test_an_sae_in_which_nothing_fires_has_empty_tables(tmp_path):
    """Beside one of another layer that is alive."""
    for layer, bias in ((1, 0.0), (3, -1000.0)):
        sae = S.SAE(256, 32, torch.Generator().manual_seed(0))
        with torch.no_grad():
            sae.b_enc += bias
        sae.save(tmp_path / "saes" / f"L{layer}" / "sae.safetensors")
    flags = ["--saes", tmp_path / "saes", "--n-tokens", 3000, "--out", tmp_path / "out"]
    for name in ("features", "heads"):
        done = program(name, *flags)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "tiny" / "features"
    assert json.loads((folder / "L3" / "features.json").read_text())["features"] == []
    assert len(json.loads((folder / "L1" / "features.json").read_text())["features"]) > 20


def test_the_page_lists_every_live_feature_and_finds_its_file(written):
    _, folder = written
    found = page_data((folder / "index.html").read_text())
    for layer in (1, 3):
        features = json.loads((folder / f"L{layer}" / "features.json").read_text())["features"]
        listed = found["features"][str(layer)]
        assert listed["feature"] == [r["feature"] for r in features] and len(features) > 100
        assert all(len(column) == len(features) for column in listed.values())
        by_chunk = {path.stem: chunk(path) for path in (folder / f"L{layer}").glob("*.js")}
        for r in features:
            shown = by_chunk[str(r["feature"] // pages.CHUNK)][str(r["feature"])]
            assert shown["family"] == r["family"] and sum(shown["counts"]) == r["n"]
            copies = sum(1 + e["copies"] for e in shown["top"])
            assert copies == min(r["n"], keep.N_TOP)
            assert shown["top"][0]["f"] == pytest.approx(r["largest"], rel=1e-3)
            for e in shown["top"]:
                here = e["q"] - e["first"]
                assert len(e["ids"]) == len(e["shades"]) and 0 <= here < len(e["ids"])
                assert abs(e["shades"][here] - 100 * e["f"] / r["largest"]) <= 1


def test_a_token_is_text_whatever_it_holds(tmp_path):
    path = tmp_path / "page.html"
    pages.fill("dashboard.html", {"vocab": ["</script><script>alert(1)</script>", "<b>", "\u2028"]},
               path)
    page = path.read_text(encoding="utf8")
    assert page.count("<script") == 2 and page.count("</script>") == 2, "a token was not escaped"
    assert page_data(page)["vocab"][0] == "</script><script>alert(1)</script>"
    assert "innerHTML" not in page
    assert not re.search(r"(src|href)\s*[=:]\s*[\"']?(https?:)?//", page)


@pytest.mark.parametrize("flags, words", [
    (["--n-tokens", "100"], "--n-tokens must be"),
    (["--n-places", "2"], "--n-places must be"),
    (["--layers", "9"], "layer 9"),
    (["--saes", "nowhere"], "--saes nowhere"),
    (["--sample", "-1"], "--sample"),
    (["--model", "nobody"], "--model nobody"),
    (["--corpus", "nowhere.txt"], "--corpus nowhere.txt"),
    (["--out", "/dev/null/x"], "choose another --out"),
], ids=str)
def test_mistakes_get_one_sentence(tmp_path, flags, words):
    done = program("features", *([] if "--out" in flags else ["--out", tmp_path]), *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


# ---- features of transcoders ----


def test_mlp_features_have_pages_without_what_is_about_heads(tmp_path):
    g = torch.Generator().manual_seed(0)
    for layer in (0, 2):
        transcoder = S.Transcoder(256, 64, 256, g)
        transcoder.save(tmp_path / "saes" / "mlp" / f"L{layer}" / "sae.safetensors")
        S.SAE(256, 64, g).save(tmp_path / "saes" / f"L{layer}" / "sae.safetensors")
    flags = ["--saes", tmp_path / "saes", "--layers", "0,2", "--n-tokens", 4_000, "--out", tmp_path]
    done = program("features", "--reads", "mlp", *flags)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny" / "mlp" / "features"
    page = page_data((folder / "index.html").read_text())
    assert page["reads"] == "mlp" and page["n_heads"] == 0 and set(page["features"]) == {"0", "2"}
    records = json.loads((folder / "L2" / "features.json").read_text())["features"]
    saved = S.SAE.load(tmp_path / "saes" / "mlp" / "L2")
    model = models.load_model("tiny")
    for record in records[::20]:
        assert record["head_weights"] == [] and record["family"] != "after a copy"
        effects = model.logit_directions(torch.arange(4096)) @ saved.W_dec[record["feature"]]
        assert record["raises"][0][0] == int(effects.argmax())
    first = next(iter(chunk(folder / "L2" / "0.js").values()))
    assert first["dfa"] == [] and "--feature mlp.2." in first["explorer"]
    assert all(example["sources"] == [] for example in first["top"])


def test_mlp_features_are_active_where_the_mlp_reads_it(tiny):
    transcoder = S.Transcoder(256, 40, 256, torch.Generator().manual_seed(1)).requires_grad_(False)
    rows = torch.randint(4000, (6, 30), generator=torch.Generator().manual_seed(0))
    tokens, kept = F.collect_places(tiny, {1: transcoder}, [rows], 6)
    found = F.read_places(tiny, {1: transcoder}, tokens, kept)[1]
    _, cache = tiny(rows, keep=(1,))
    f = transcoder.encode(cache[1].mlp_in)
    assert int(kept[1].n.sum()) == int((f[:, 1:] > 0).sum())
    top = kept[1].top
    torch.testing.assert_close(f[top.row, top.q, top.feature], top.f)
    shown = found.top.window[:, F.BEFORE].float()
    torch.testing.assert_close(shown, top.f, atol=1e-2, rtol=1e-2)      # half precision
    assert (found.reads.source == -1).all() and found.reads.head_value.shape[1] == 0


def test_transcoders_that_are_not_there_are_named(tmp_path):
    for flags, words in ((["--reads", "mlp", "--saes", tmp_path / "x"], "there are no transcoders"),
                         (["--reads", "else", "--saes", tmp_path / "x"], "neither z_cat nor mlp")):
        S.SAE(256, 8).save(tmp_path / "x" / "L0" / "sae.safetensors")
        done = program("features", *flags, "--n-tokens", 4_000, "--out", tmp_path)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_activations_beyond_half_precision_keep_their_shade():
    """MLP features of large models reach 70,000."""
    activations = torch.tensor([[1.0, 35_000.0, 70_000.0, 7_000.0]])
    dfa = F.example_dfa(torch.zeros(1, 1, 4), activations, torch.tensor([2]))
    here = F.BEFORE
    shades = 100 * dfa.window[0, here - 1:here + 2].float() / 70_000
    torch.testing.assert_close(shades, torch.tensor([50.0, 100.0, 10.0]), atol=0.5, rtol=0)
