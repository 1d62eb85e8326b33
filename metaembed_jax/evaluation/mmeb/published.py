"""Published figures of MMEB: Precision@1 of all 36 tasks, from arXiv 2509.18095, as fractions, by budget."""

PUBLISHED = {
    "MetaEmbed-3B": {"1:1": 0.654, "16:64": 0.691},
    "MetaEmbed-7B": {"1:1": 0.713, "8:16": 0.743, "16:64": 0.766},
    "MetaEmbed-32B": {"1:1": 0.724, "16:64": 0.787},
}
