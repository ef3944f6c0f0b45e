"""LVSpec (arXiv 2604.05650): the drafted tokens most relevant to what is seen are anchors, the others fillers."""

from vllm_lvspec.verify.policies import Policy, share_of_chain

LVSPEC = Policy(
    score=lambda evidence, config: evidence.relevance,
    num_fillers=share_of_chain,
    uses_relevance=True,
    shifts=True,
)
