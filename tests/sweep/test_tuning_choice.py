"""Tuning without a model: the grids that are tried, the setting that is chosen, and the preset that is written."""

import dataclasses

import pytest
from helpers.edit_command import STARTING_PRESET
from hypothesis import given, strategies as st

from causalcone.engine.errors import ExperimentError
from causalcone.runners.edits.presets import load_hparams, load_preset, preset_text, tuned_preset
from causalcone.runners.options import TuningOptions
from causalcone.runners.tuning.grid import problem_grids
from causalcone.runners.tuning.results import ROUNDING, Candidate, choose

# --- the choice ---


def chosen(*candidates, **options):
    return choose([Candidate(*each) for each in candidates], **options)


def test_the_highest_rewrite_score_that_is_not_too_high():
    assert chosen((0.5, 0.9, 0.9), (0.99, 0.9, 0.9), (0.8, 0.9, 0.9)).number == 1
    assert chosen((0.5, 0.9, 0.9), (0.9901, 0.9, 0.9), (0.8, 0.9, 0.9)).number == 2
    assert chosen((0.5, 0.9, 0.9), (0.8, 0.9, 0.9), most=0.5).number == 0


@pytest.mark.parametrize("given_up", [(0.6, 0.9), (0.9, 0.6)])
def test_paraphrase_and_neighborhood_are_not_given_up_for_it(given_up):
    assert chosen((0.5, 0.9, 0.9), (0.9, *given_up)).number == 0
    assert chosen((0.5, 0.9, 0.9), (0.9, *given_up), give_up=0.3).number == 1


def test_the_best_are_those_of_admissible_settings():
    assert chosen((1.0, 1.0, 1.0), (0.9, 0.5, 0.5), (0.8, 0.52, 0.52)).number == 1


def test_what_is_given_up_may_be_exactly_so_much():
    assert chosen((0.5, 0.9, 0.9), (0.9, 0.85, 0.9)).number == 1


def test_settings_that_are_all_too_good():
    choice = chosen((1.0, 0.9, 0.9), (0.995, 0.1, 0.1), (0.999, 0.9, 0.9))
    assert (choice.number, "above 0.99; the lowest is taken" in choice.note) == (1, True)


def test_settings_that_all_give_up_too_much():
    """One has the best paraphrase score, another the best neighbourhood score."""
    choice = chosen((0.9, 0.9, 0.5), (0.5, 0.4, 0.9), (0.7, 0.7, 0.8))
    assert (choice.number, "gives up the least, 0.200" in choice.note) == (2, True)


def test_of_equals_the_more_cautious_one():
    same = (0.9, 0.8, 0.8)
    assert chosen((*same, (1.0,)), (*same, (2.0,)), (*same, (1.5,))).number == 1
    assert chosen((*same, (1.0, 2.0)), (*same, (1.0, 3.0)), (*same, (0.0, 9.0))).number == 1
    assert chosen((*same, (1.0,)), (*same, (1.0,))).number == 0
    assert chosen((*same, (1.0,)), (*same, (2.0,)), most=0.5).number == 1
    assert chosen((0.9, 0.8, 0.2, (1.0,)), (0.9, 0.2, 0.8, (2.0,))).number == 1


def test_scores_that_are_missing():
    assert chosen((None, None, None), (0.5, None, 0.9), (0.6, None, 0.88)).number == 2
    assert chosen((0.5, None, None), (0.6, None, None)).note is None
    with pytest.raises(ExperimentError, match="no setting has a rewrite score"):
        chosen((None, 0.5, 0.5))


share = st.floats(0, 1)
candidates = st.builds(Candidate, share, share, share, st.tuples(share))


@given(st.lists(candidates, min_size=1, max_size=12), share, share)
def test_what_is_chosen_is_admissible_and_none_that_is_beats_it(tried, most, give_up):
    choice = choose(tried, most, give_up)
    best = tried[choice.number]
    admissible = [each for each in tried if each.rewrite <= most]
    if not admissible:
        assert best.rewrite == min(each.rewrite for each in tried)
        assert choice.note
        return

    def lost(each):
        return max(max(getattr(a, kind) for a in admissible) - getattr(each, kind) for kind in KINDS)

    assert best in admissible
    kept = [each for each in admissible if lost(each) <= give_up + ROUNDING]
    if kept:
        assert best in kept
        assert (best.rewrite, best.caution) == max((each.rewrite, each.caution) for each in kept)
    else:
        assert lost(best) == min(map(lost, admissible))
    assert (choice.note is None) == bool(kept)


KINDS = ("paraphrase", "neighborhood")

# --- the grid ---


def options(*methods, **more):
    return TuningOptions(method=list(methods), layer=1, moments="m", **more)


def values(found):
    return [[dict(point.values) for point in grid.points] for grid in found.grids]


def test_the_published_grids():
    (found,) = problem_grids(options("rome", "memit:3", "finetune:1", "finetune:5"))
    kl = [{"kl_factor": value} for value in (0.0625, 0.9, 1.0)]
    norms = [{"norm_constraint": value} for value in (1e-4, 5e-5, 2e-5, 1e-5)]
    assert values(found) == [kl, kl, norms, norms]
    assert found.plan.layers == (1,)
    assert [point.caution for point in found.grids[0].points] == [(0.0625,), (0.9,), (1.0,)]
    assert found.grids[2].points[3].caution > found.grids[2].points[0].caution


def test_grids_of_ones_own():
    """Names of one method make all combinations; what is not said of it stays as the preset has it."""
    grid = ["memit.kl_factor=0.5,1", "covariance_weight=100,200", "rome.stop_loss=never,0.1"]
    found = problem_grids(options("rome", "memit:3", grid=grid, preset="gptj", problem=["fact_forcing"]))[0]
    rome, memit = values(found)
    assert rome == [{"stop_loss": None}, {"stop_loss": 0.1}]
    pairs = [(0.5, 100.0), (0.5, 200.0), (1.0, 100.0), (1.0, 200.0)]
    assert memit == [{"kl_factor": kl, "covariance_weight": weight} for kl, weight in pairs]
    assert str(found.grids[1].points[1]) == "kl_factor=0.5, covariance_weight=200"
    first = found.grids[0].points[0].setting.hparams
    assert first == load_hparams("gptj", "rome", "fact_forcing")


def test_words_at_their_default_are_not_compared():
    """With folders that were begun before there were any."""
    configurations = [
        problem_grids(options(name, grid=["kl_factor=1"]))[0].configuration for name in ("rome", "r-rome")
    ]
    usual, mean = (next(iter(each["grid"].values()))["0"] for each in configurations)
    assert "keys" not in usual
    assert mean == {**usual, "keys": "mean"}


BAD_OPTIONS = {
    "unknown name": ({"grid": ["rome.norm_constraint=1,2"]}, "no chosen method has that hyperparameter; there are"),
    "method that is not chosen": ({"grid": ["memit.kl_factor=1"]}, "no chosen method has that hyperparameter"),
    "unknown method of a grid": ({"grid": ["mend.lr=1"]}, "--grid mend.lr=1: unknown method 'mend'"),
    "no values": ({"grid": ["kl_factor="]}, "--grid 'kl_factor=' is not a grid; give NAME=V1,V2"),
    "no grid": ({"grid": ["kl_factor"]}, "is not a grid"),
    "a value that is missing": ({"grid": ["kl_factor=1,,2"]}, "is not a grid"),
    "no number": ({"grid": ["kl_factor=1,much"]}, "--grid kl_factor=much: give a number"),
    "negative": ({"grid": ["kl_factor=-1"]}, "kl_factor is -1.0"),
    "value twice": ({"grid": ["kl_factor=1,1.0"]}, "a value is given twice"),
    "name twice": ({"grid": ["kl_factor=1", "rome.kl_factor=2"]}, "give each name once"),
    "unknown method": ({"method": ["mend"]}, "unknown method 'mend'"),
    "one place in a preset": ({"method": ["memit:3", "memit:5"]}, "a preset has one setting for memit:3 and memit:5"),
    "joint": ({"method": ["memit:3", "memit_joint:3"]}, "a preset has one setting for memit:3 and memit_joint:3"),
    "set and varied": ({"changes": ["kl_factor=1"]}, "--set kl_factor=1: the grid of rome varies that"),
    "problem twice": ({"problem": ["fact_erasure"] * 2}, "a problem is given twice"),
    "unknown problem": ({"problem": ["fact_lifting"]}, "problem is 'fact_lifting'"),
    "aggregate": ({"aggregate": "median"}, "median"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_grids_that_make_no_sense(case):
    changes, reason = BAD_OPTIONS[case]
    with pytest.raises(ExperimentError) as raised:
        problem_grids(dataclasses.replace(options("rome"), **changes))
    assert reason in str(raised.value)


# --- the preset ---


@pytest.fixture
def preset(tmp_path):
    (tmp_path / "mine.toml").write_text(STARTING_PRESET)
    return str(tmp_path / "mine.toml")


@pytest.mark.parametrize("name", [None, "gptj", "demo", "OWN"])
def test_a_written_preset_gives_what_was_chosen(name, preset, tmp_path):
    """Also what --set says, a window without settings of its own, and an early stop that is switched off."""
    start = preset if name == "OWN" else name
    changes = ["rome.steps=9", "memit.stop_loss=never", "stop_loss=0.5"]
    asked = options("rome", "memit:3", "finetune:1", "finetune:3", preset=start, changes=changes, sigma="0.2")
    (found,) = problem_grids(asked)
    picked = [("error_injection", grid.points[1].setting, grid.points[1].values) for grid in found.grids]
    path = tmp_path / "tuned.toml"
    table = tuned_preset(start, 5, found.plan.sigma, found.plan.aggregate, picked)
    path.write_text(preset_text(table, ["of two\nlines"]), encoding="utf-8")
    for problem, setting, _ in picked:
        assert load_hparams(str(path), setting.method, problem, setting.window) == setting.hparams
    written = load_preset(str(path))
    if start is None:
        assert written.problem_names() == ("error_injection",)
        assert (written.edit_layers, written.aggregate, written.sigma) == ((0, 1, 2, 3, 4), "first", 0.2)
        return
    before = load_preset(start)
    assert written.problem_names() == before.problem_names()
    kept = {"sigma": 0.2, "problems": written.problems}
    assert written == before.model_copy(update=kept)
    for problem in before.problem_names()[1:]:
        for method in ("rome", "memit", "finetune"):
            assert load_hparams(str(path), method, problem, 5) == load_hparams(start, method, problem, 5)
