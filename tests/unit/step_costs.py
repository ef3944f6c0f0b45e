"""Costs of steps that tests of the drafter and of its lengths share."""

from hypothesis import strategies as st

from vllm_lvspec.draft.length import StepCosts

FREE = StepCosts([1, 1000], [1.0, 1.0], [0.0, 0.0])  # whatever is drafted costs nothing
LOADED = StepCosts([1, 1000], [1.0, 1000.0], [0.1, 0.1])  # every row costs the target as much as another step
RANDOM_COSTS = st.builds(
    StepCosts,
    st.just([1, 4, 32]),
    st.lists(st.floats(0.1, 3.0), min_size=3, max_size=3).map(sorted),
    st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3).map(sorted),
    st.floats(0, 1e-3),
    st.floats(0, 1e-3),
    st.floats(0, 1e-3),
)
