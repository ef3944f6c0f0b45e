"""Costs of steps that several tests share."""

from hypothesis import strategies as st

from vllm_lvspec.draft.costs import StepCosts

FREE = StepCosts([1, 1000], [1.0, 1.0], [0.0, 0.0])  # whatever is drafted costs nothing
LOADED = StepCosts([1, 1000], [1.0, 1000.0], [0.1, 0.1])  # every row costs the target as much as another step
GRAPHS = StepCosts([1, 100], [1.0, 2.0], [0.1, 0.1], target_per_context=1e-4, pieces=[1.5, 2.1])  # 1.5 by the host
RANDOM_COSTS = st.builds(
    StepCosts,
    st.just([1, 4, 32]),
    st.lists(st.floats(0.1, 3.0), min_size=3, max_size=3).map(sorted),
    st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3).map(sorted),
    st.floats(0, 1e-3),
    st.floats(0, 1e-3),
    st.floats(0, 1e-3),
)
