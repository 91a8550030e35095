"""A delta lies on a model for exactly as long as it should, and comes off bit for bit."""

import copy
import gc
import pickle
import random
import warnings
import weakref

import pytest
import torch
from helpers.edited_models import IDS, bits, dense, down, low_rank, seen, sizes
from helpers.families import FAMILIES
from helpers.models import gpt2

from causalcone.engine.edit.deltas.apply import RoundedAway, applied, apply
from causalcone.engine.edit.deltas.delta import Delta, Dense
from causalcone.engine.errors import ExperimentError, ModelError

pytestmark = pytest.mark.filterwarnings("error::causalcone.engine.edit.deltas.apply.RoundedAway")


@pytest.fixture
def own():
    """A float64 GPT-2 that a test may change."""
    return gpt2(3)


# --- applying and reverting ---


class BoomError(Exception):
    pass


class Play:
    """Random applying and reverting on one model, beside a plain record of the deltas on it, the last one last."""

    def __init__(self, model, changes, chance):
        self.model, self.changes, self.chance = model, changes, chance
        self.before = [seen(model, layer).clone() for layer in range(3)]
        self.live = []
        self.refused = self.exceptions = 0

    def run(self, depth=0):
        mine = []
        try:
            for _ in range(self.chance.randint(2, 5)):
                step = self.chance.choice((self.apply, self.apply, self.revert, self.revert, self.within, self.misfit))
                step(mine, depth)
                self.check()
            if depth and self.chance.random() < 0.3:
                raise BoomError
        finally:
            while mine:
                handle, delta = mine.pop()
                self.live.remove(delta)
                handle.revert()

    def apply(self, mine, depth):
        delta = self.some()
        mine.append((apply(self.model, delta), delta))
        self.live.append(delta)

    def revert(self, mine, depth):
        if not mine:
            return
        handle, delta = self.chance.choice(mine)
        later = self.live[self.live.index(delta) + 1 :]
        if any(set(delta.layers) & set(other.layers) for other in later):
            with pytest.raises(ExperimentError, match="holds a later delta"):
                handle.revert()
            self.refused += 1
        else:
            handle.revert()
            mine.remove((handle, delta))
            self.live.remove(delta)

    def within(self, mine, depth):
        if depth == 3:
            return
        delta = self.some()
        try:
            with applied(self.model, delta):
                self.live.append(delta)
                try:
                    self.run(depth + 1)
                finally:
                    self.live.remove(delta)
        except BoomError:
            self.exceptions += 1

    def misfit(self, mine, depth):
        with pytest.raises(ExperimentError, match="layers are 0 to 2"):
            apply(self.model, Delta({**self.some().changes, 3: self.changes[0]}))

    def some(self):
        layers = self.chance.sample(range(3), self.chance.randint(1, 3))
        return Delta({layer: self.chance.choice(self.changes) for layer in layers})

    def check(self):
        """What is on the weights is what the record says, as far as rounding lets it be seen."""
        layer = self.chance.randrange(3)
        changes = [delta.changes[layer] for delta in self.live if layer in delta.changes]
        wanted = sum((change.rows(slice(None)) for change in changes), self.before[layer].double())
        tolerance = 10 * torch.finfo(self.before[layer].dtype).eps
        torch.testing.assert_close(seen(self.model, layer).double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("gpt2", torch.float64), ("llama", torch.float32), ("opt", torch.float16), ("gpt2", torch.bfloat16)],
)
def test_after_any_sequence_every_bit_is_as_before(family, dtype):
    """250 sequences each: deltas of one or more layers, nested, in any order, with exceptions and refusals."""
    warnings.simplefilter("ignore", RoundedAway)
    model = FAMILIES[family](3, 8, 2, dtype=dtype)
    before = bits(model)
    changes = [low_rank(model), low_rank(model, seed=2), dense(model, bias=family != "llama"), dense(model, bias=False)]
    play = Play(model, changes, None)
    for seed in range(250):
        play.chance = random.Random(f"{family} {dtype} {seed}")
        play.run()
        assert bits(model) == before, f"sequence {seed}"
        assert not play.live
    assert play.refused > 10
    assert play.exceptions > 20


def test_deltas_on_one_layer_come_off_in_reverse_order(own):
    before = bits(own)
    first, second = apply(own, Delta({0: low_rank(own), 1: low_rank(own)})), apply(own, Delta({1: dense(own)}))
    other = apply(own, Delta({2: dense(own)}))
    both = bits(own)
    with pytest.raises(ExperimentError, match="layer 1 holds a later delta; revert that one first"):
        first.revert()
    assert bits(own) == both, "a refused revert writes nothing"
    second.revert()
    first.revert()
    other.revert()
    assert bits(own) == before
    with pytest.raises(ExperimentError, match="reverted already"):
        first.revert()
    assert bits(own) == before


def test_a_delta_that_changes_nothing_still_counts(own):
    nothing = Dense(torch.zeros(sizes(own)), None)
    first, second = apply(own, Delta({1: low_rank(own)})), apply(own, Delta({1: nothing}))
    with pytest.raises(ExperimentError, match="later delta"):
        first.revert()
    second.revert()
    first.revert()


def test_a_delta_under_one_that_stays_for_good_stays_too(own):
    first = apply(own, Delta({1: low_rank(own)}))
    apply(own, Delta({1: low_rank(own, seed=5)}))
    with pytest.raises(ExperimentError, match=r"layer 1 .* load the model again"):
        first.revert()
    with applied(own, Delta({1: dense(own)})):
        edited = bits(own)
    assert bits(own) != edited


def test_an_exception_goes_on_and_the_weights_come_back(own):
    before, edited = bits(own), []

    def fail(error):
        with applied(own, Delta({0: low_rank(own), 2: dense(own)})):
            edited.append(bits(own))
            raise error

    for error in (BoomError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(error)
        assert bits(own) == before
    assert edited[0] == edited[1] != before


def step_of_an_optimizer(model):
    logits = model(IDS).logits
    logits.logsumexp(-1).sum().backward()
    torch.optim.SGD([down(model, 1).weight], lr=0.1).step()


def loading(model):
    model.load_state_dict(gpt2(3, seed=1).state_dict())


def past_the_version(model):
    down(model, 1).weight.data[3, 4] *= 1 + 2**-50


def replacing(model):
    down(model, 1).weight = torch.nn.Parameter(torch.zeros_like(down(model, 1).weight))


def another_dtype(model):
    model.to(torch.float32)


def another_block(model):
    model.transformer.h[1] = copy.deepcopy(model.transformer.h[1])


def no_bias(model):
    down(model, 1).register_parameter("bias", None)


@pytest.mark.parametrize(
    ("change", "layer", "match"),
    [
        (step_of_an_optimizer, 1, "holds other values"),
        (loading, 0, "holds other values"),
        (past_the_version, 1, "holds other values"),
        (replacing, 1, "holds other values"),
        (another_dtype, 0, "torch.float32"),
        (another_block, 1, "is another parameter"),
        (no_bias, 1, "is another parameter"),
    ],
)
def test_weights_that_something_else_changed_are_not_reverted(own, change, layer, match):
    handle = apply(own, Delta({0: low_rank(own), 1: dense(own)}))
    change(own)
    changed = bits(own)
    with pytest.raises(ModelError, match=rf"h\.{layer}\.mlp\.c_proj\.(weight|bias) .* {match}.* load the model"):
        handle.revert()
    assert bits(own) == changed


def test_a_change_that_is_undone_is_in_nobodys_way(own):
    before = bits(own)
    handle = apply(own, Delta({1: dense(own)}))
    weight = down(own, 1).weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(ModelError):
        handle.revert()
    with torch.no_grad():
        weight.copy_(kept)
    other = torch.optim.SGD([own.lm_head.weight], lr=0.1)
    own(IDS).logits.sum().backward()
    other.step()
    handle.revert()
    after = bits(own)
    assert {name for name in before if after[name] != before[name]} == {"transformer.wte.weight"}


def test_applying_half_way_is_undone(own):
    before = bits(own)
    broken = low_rank(own)
    broken.left[3, 0] = float("nan")
    with pytest.raises(ExperimentError, match="change of layer 2 holds NaN"):
        apply(own, Delta({0: low_rank(own), 1: dense(own), 2: broken}))
    assert bits(own) == before
    narrow = gpt2(3, dtype=torch.float16)
    before = bits(narrow)
    huge = Dense(torch.full(sizes(narrow), 1e5), None)
    with pytest.raises(
        ExperimentError, match=r"h\.2\.mlp\.c_proj\.weight would hold NaN or infinity in torch\.float16"
    ):
        apply(narrow, Delta({0: low_rank(narrow), 2: huge}))
    assert bits(narrow) == before
    apply(narrow, Delta({0: low_rank(narrow)})).revert()
    assert bits(narrow) == before


def test_versions_tell_of_every_change(own):
    """Whoever keeps copies of weights can see that they are out of date, also where autograd is off altogether."""
    weight = down(own, 1).weight
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        start = weight._version
        with mode():
            handle = apply(own, Delta({1: low_rank(own)}))
        middle = weight._version
        with mode():
            handle.revert()
        assert start < middle < weight._version
    assert weight.requires_grad
    assert not weight.is_inference()
    own(IDS).logits.sum().backward()


def test_parameters_made_in_inference_mode_are_edited_too():
    with torch.inference_mode():
        model = gpt2(2)
    before, delta = bits(model), Delta({0: low_rank(model), 1: dense(model)})
    assert down(model, 0).weight.is_inference()
    with applied(model, delta):
        edited = bits(model)
    assert bits(model) == before
    with torch.inference_mode(), applied(model, delta):
        assert bits(model) == edited
    assert bits(model) == before != edited


def test_autocast_does_not_coarsen_a_delta():
    model = gpt2(2, dtype=torch.float32)
    delta = Delta({1: low_rank(model)})
    with applied(model, delta):
        wanted = bits(model)
    with torch.autocast("cpu", torch.bfloat16), applied(model, delta):
        assert bits(model) == wanted


def test_gradients_of_a_delta_do_not_reach_the_model(own):
    few = low_rank(own)
    few.left.requires_grad_(True)
    with applied(own, Delta({1: few})):
        assert down(own, 1).weight.is_leaf
        assert Delta({1: few}).norm > 0


@pytest.mark.gpu
def test_a_model_may_be_on_another_device_and_move_meanwhile():
    model = gpt2(3, dtype=torch.float32).cuda()
    before = bits(model.cpu())
    delta = Delta({0: low_rank(model), 2: dense(model)})
    for start, end in (("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")):
        model.to(start)
        with applied(model, delta):
            weight = down(model, 0).weight.detach().cpu()
            model.to(end)
        assert down(model, 0).weight.device.type == end
        assert bits(model.cpu()) == before
        wanted = down(model, 0).weight.detach() + (low_rank(model).left @ low_rank(model).right.T).T.float()
        torch.testing.assert_close(weight, wanted)


# --- what handles keep alive ---


def test_nothing_keeps_a_model_alive():
    model = gpt2(2)
    alive = weakref.ref(model)
    apply(model, Delta({0: low_rank(model)}))
    handle = apply(model, Delta({1: low_rank(model)}))
    handle.revert()
    del model
    gc.collect()
    assert alive() is None


def test_an_edited_model_is_copied_as_any_other(own):
    before, delta = bits(own), Delta({0: low_rank(own), 1: dense(own)})
    with applied(own, delta):
        edited = bits(own)
        twins = copy.deepcopy(own), pickle.loads(pickle.dumps(own))
        for twin in twins:
            assert bits(twin) == edited
            with applied(twin, delta):
                assert bits(own) == edited != bits(twin)
            assert bits(twin) == edited
    assert bits(own) == before
    assert all(bits(twin) == edited for twin in twins)
