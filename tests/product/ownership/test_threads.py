"""Eight threads, the first call included, on one replaced model or on a copy each: the bits of one thread."""

from __future__ import annotations

import copy
import threading

import pytest

from moe_kernels import replace_moe
from tests.contenders import each_backend
from tests.product.ownership.models import assert_same, gradients, make_model, make_replaced, make_x

THREADS, CALLS = 8, 3


def run(uses) -> None:
    """Call all of `uses` at the same moment, each in a thread; raise what one of them raised."""
    barrier, errors = threading.Barrier(len(uses)), []

    def work(use):
        try:
            barrier.wait(timeout=60)
            use()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(use,)) for use in uses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@each_backend
@pytest.mark.parametrize("copies", ["one model", "a copy each"])
def test_eight_threads_give_the_bits_of_one(copies, backend, seed):
    expected = [gradients(make_replaced(seed, backend), make_x(seed + i)) for i in range(THREADS)]
    model = make_replaced(seed, backend)
    models = [model if copies == "one model" else copy.deepcopy(model) for _ in range(THREADS)]

    def use(i):
        def call():
            for _ in range(CALLS):
                assert_same(gradients(models[i], make_x(seed + i)), expected[i])

        return call

    run([use(i) for i in range(THREADS)])


@each_backend
def test_copying_saving_and_calling_at_once(backend, seed):
    model, expected = make_replaced(seed, backend), gradients(make_replaced(seed, backend), make_x(seed))

    def call():
        assert_same(gradients(model, make_x(seed)), expected)

    def copied():
        assert_same(gradients(copy.deepcopy(model), make_x(seed)), expected)

    run([call, copied] * (THREADS // 2))


def test_replacing_models_in_threads(seed):
    models = [make_model(seed) for _ in range(THREADS)]
    expected = gradients(make_replaced(seed, "auto"), make_x(seed))
    run([lambda model=model: replace_moe(model) for model in models])
    for model in models:
        assert_same(gradients(model, make_x(seed)), expected)
