"""Random draws are functions of their keys, and the same on every machine."""

import numpy as np

from cai_utils import seeds


def test_a_key_gives_the_same_numbers_everywhere():
    assert seeds.stable_int("principle", 0, 1, 2) == 252026895
    stream = seeds.stream(0, "harmless", "a", "b", "p")
    assert stream.integers(1000, size=3).tolist() == [131, 165, 484]
    expected = [0.1720687747001648, 0.19704151153564453, 0.15487128496170044]
    assert seeds.uniforms(7, [(3, 1)], 3)[0].tolist() == expected


def test_integers_have_the_bits_asked_for():
    drawn = [seeds.stable_int("x", i, bits=2) for i in range(400)]
    assert set(drawn) == {0, 1, 2, 3}
    assert max(seeds.stable_int(i) for i in range(100)) < 2**31


def test_a_draw_does_not_depend_on_the_others():
    alone = seeds.uniforms(-1, [(5, 2)], 4)
    among = seeds.uniforms(-1, [(0, 0), (5, 2), (2, 5)], 8)
    assert among.dtype == np.float32 and (0 <= among).all() and (among < 1).all()
    np.testing.assert_array_equal(alone[0], among[1, :4])
    assert len(np.unique(among)) == among.size
