"""Keys of samples, and which sample goes into which shard."""

from __future__ import annotations

from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.packing.splits import ShardPlan, key_of, key_with_hash, plan_shards, safe_key, shuffle_rank


def test_keys_have_no_dots_and_no_slashes_and_are_short() -> None:
    images = [
        "a.jpg",
        "d/a.jpg",
        "d_a.jpg",
        "d.a.jpg",
        "x" * 200 + "1.jpg",
        "x" * 200 + "2.jpg",
        "照片.jpg",
        "\udcff.jpg",
    ]
    keys = [key_of(Candidate(image, None, "")) for image in images]
    assert len(set(keys)) == len(images)
    assert {"a", "d_a", "照片"} < set(keys)
    for key in keys:
        assert "." not in key and "/" not in key and len(key.encode()) <= 80
        assert safe_key(key) == key


def test_the_users_own_key_comes_first() -> None:
    assert key_of(Candidate("a.jpg", "mine", "")) == "mine"
    assert key_of(Candidate("a.jpg", "not.mine", "")).startswith("not_mine-")


def test_a_hash_makes_a_taken_key_different() -> None:
    assert key_with_hash("a", "a.png") == "a-7f071235"
    assert key_with_hash("a", "a.png") != key_with_hash("a", "a.jpg")
    assert len(key_with_hash("文" * 80, "x").encode()) <= 80


def test_the_order_depends_on_the_seed_and_never_changes() -> None:
    names = [f"{i}.jpg" for i in range(8)]
    orders = [sorted(names, key=lambda name, seed=seed: shuffle_rank(name, seed)) for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] == [
        "2.jpg",
        "3.jpg",
        "1.jpg",
        "5.jpg",
        "0.jpg",
        "4.jpg",
        "7.jpg",
        "6.jpg",
    ]  # shards are built again and gone on with


def test_slices_are_whole_but_for_the_last() -> None:
    assert plan_shards({"train": 5, "val": 3, "test": 1}, samples_per_shard=2) == [
        ShardPlan("train-000000", 3, 5),
        ShardPlan("train-000001", 5, 7),
        ShardPlan("train-000002", 7, 8),
        ShardPlan("val-000000", 0, 2),
        ShardPlan("val-000001", 2, 3),
        ShardPlan("test-000000", 8, 9),
    ]
    assert plan_shards({}, samples_per_shard=2) == []
