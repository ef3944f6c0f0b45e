"""LVSpec (arXiv 2604.05650): the drafted tokens most relevant to what is seen are anchors, the others fillers."""

from vllm_lvspec.verify.policies.policy import Policy, share_of_chain

LVSPEC = Policy(
    # Rounded, so that tokens of the same state are ties whatever the order in which their products were summed.
    score=lambda evidence, config: evidence.relevance.round(decimals=6),
    num_fillers=share_of_chain,
    uses_relevance=True,
    has_relaxation=True,
)
