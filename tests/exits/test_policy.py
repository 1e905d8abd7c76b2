import json
import math
import threading

import pytest
import torch
from exits.tables import table_like

from timm_dynamic.exits import ValuePolicy, solve_policy


def test_policy_by_hand():
    # Confidence 0.9 at step 1 is 0.75 of the scale -0.6..1.4. Weights that make change(x) = 0.002 + 0.998 / 2,
    # benefit(x) = 0.2 + x - 0.6, cost(x) = 0.3, at most 0.25: 0.501 * 0.35 <= 0.25, so it stops. With x = 1 (1.4
    # and above): 0.501 * 0.6 = 0.3006 > 0.25, it goes on.
    zeros = [0.] * 6
    policy = ValuePolicy(([-0.6, 1.4], [0., 1.]), [[0.] * 7], [[0.2, 1., *zeros]], [[0.3, 0., *zeros]], [(0.1, 0.25)])
    assert policy.num_steps == 2
    assert policy(torch.tensor([[0.9], [1.4], [2.], [math.nan]])).tolist() == [True, False, False, True]
    assert policy(torch.zeros(3, 2)).tolist() == [True] * 3  # all stop at the last step
    assert policy(torch.zeros(0, 1)).shape == (0,)


def test_repr_is_short():
    policy = ValuePolicy(([-0.6, 1.4], [0., 1.]), [], [], [], [])
    assert repr(policy) == 'ValuePolicy(num_steps=1)'


@pytest.fixture(scope='module')
def policy():
    return solve_policy(table_like(1000, 4), 2.)


def test_policy_round_trip(policy):
    again = ValuePolicy.from_state_dict(json.loads(json.dumps(policy.state_dict(), allow_nan=False)))
    assert again.state_dict() == policy.state_dict()
    table = table_like(500, 4, seed=1)
    assert torch.equal(table.steps_used(again), table.steps_used(policy))
    assert len(table.steps_used(policy).unique()) == 4


def test_policy_row_by_row_and_dtypes(policy):
    confidence = table_like(200, 4, seed=1).confidence
    for t in range(1, 4):
        stop = policy(confidence[:, :t])
        assert (stop.dtype, stop.shape) == (torch.bool, (200,))
        assert [bool(policy(row[None, :t])) for row in confidence] == stop.tolist()
        assert torch.equal(policy(confidence[:, :t].double()), stop)
        assert (policy(confidence[:, :t].bfloat16()) == stop).float().mean() > 0.9


def test_policies_between():
    table = table_like(2000, 4)
    low, high = solve_policy(table, 1.6), solve_policy(table, 2.2)
    between = low.interpolate(high, 0.5)
    for name in ('change', 'benefit', 'cost'):
        for a, b, c in zip(getattr(low, name), getattr(high, name), getattr(between, name)):
            torch.testing.assert_close(c, (a + b) / 2)
    for (a, b), (c, d), found in zip(low.cost_range, high.cost_range, between.cost_range):
        assert found == pytest.approx(((a + c) / 2, (b + d) / 2))
    assert low.interpolate(high, 0.).state_dict() == low.state_dict()
    point = table.evaluate(between)
    assert point.gmacs == pytest.approx(1.9, rel=0.05)
    assert point.top1 == pytest.approx(table.evaluate(solve_policy(table, 1.9)).top1, abs=0.5)
    assert low.interpolate(solve_policy(table_like(2000, 3), 1.6), 0.5) is None
    assert low.interpolate(solve_policy(table_like(1999, 4, seed=1), 1.6), 0.5) is None  # another scale of confidence


def test_policy_in_threads(policy):
    confidences = [table_like(300, 4, seed=s).confidence for s in range(4)]
    expected = [policy(c[:, :2]).tolist() for c in confidences]
    found = [None] * 4

    def run(i):
        for _ in range(20):
            found[i] = policy(confidences[i][:, :2]).tolist()
            if found[i] != expected[i]:
                break

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_bad_policies(policy):
    for history in (torch.zeros(3), torch.zeros(3, 0), torch.zeros(3, 5)):
        with pytest.raises(ValueError, match='confidences of 1 to 4 steps'):
            policy(history)
    state = policy.state_dict()
    for change, message in [
            ({'more': 1}, 'A ValuePolicy has'),
            ({'change': state['change'][:2]}, 'not one of a ValuePolicy|argument'),
            ({'benefit': [w[:-1] for w in state['benefit']]}, 'weights for step 1'),
            ({'cost': [[math.nan] * len(w) for w in state['cost']]}, 'not all finite'),
            ({'scale': [1, 0]}, 'scale of as many confidences as values'),
            ({'scale': [[0.5, 0.5], [0, 1]]}, 'knots of a scale must rise'),
            ({'scale': None}, 'not one of a ValuePolicy'),
            ({'cost_range': state['cost_range'][:1]}, '3 cost ranges'),
            ({'benefit': 'x'}, 'ValuePolicy|argument'),
    ]:
        with pytest.raises(ValueError, match=message):
            ValuePolicy.from_state_dict({**state, **change})
    with pytest.raises(ValueError, match='A ValuePolicy has'):
        ValuePolicy.from_state_dict({})
