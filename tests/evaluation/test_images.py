"""Sets of images give the same blocks at every pass, whoever reads them and however they were cut before."""

import numpy as np
from planted import NETWORK

from pipeline.common.randomness import Purpose
from pipeline.evaluation.images import ArrayImages, GeneratedImages, Subset, rebatch
from pipeline.model.networks import build_generator, initialize
from pipeline.model.sampling import images_of, sample


def test_rebatch_keeps_every_image_in_order() -> None:
    pieces = [np.arange(a, b, dtype=np.uint8).reshape(-1, 1, 1, 1) for a, b in [(0, 3), (3, 3), (3, 20), (20, 21)]]
    blocks = list(rebatch(pieces, 8))
    assert [len(block) for block in blocks] == [8, 8, 5]
    assert np.concatenate(blocks).ravel().tolist() == list(range(21))


def test_a_subset_is_every_second_image_and_no_more_than_asked() -> None:
    images = np.arange(300, dtype=np.uint8).reshape(-1, 1, 1, 1)
    subset = Subset(ArrayImages(images), 1, 2, 140)
    blocks = dict(subset.blocks())
    assert [len(block) for block in blocks.values()] == [128, 12]
    assert np.concatenate(list(blocks.values())).ravel().tolist() == [n % 256 for n in range(1, 281, 2)]
    assert dict(subset.blocks(1, 2)).keys() == {1}


def test_generated_images_are_the_trainers_and_the_same_at_every_pass() -> None:
    generator = build_generator(NETWORK).eval()
    initialize(generator, 0, lane=1)
    images = GeneratedImages(generator, 300, seed=5)
    passes = [np.concatenate([pixels for _, pixels in images.blocks()]) for _ in range(2)]
    np.testing.assert_array_equal(passes[0], passes[1])
    np.testing.assert_array_equal(passes[0], sample(generator, 5, Purpose.EVALUATE, 0, 300))
    shares = [dict(images.blocks(rank, 2)) for rank in range(2)]
    joined = np.concatenate([(shares[0] | shares[1])[block] for block in range(3)])
    np.testing.assert_array_equal(joined, passes[0])
    assert images_of(generator, np.zeros((1, NETWORK.latent_dim), np.float32)).dtype == np.uint8
