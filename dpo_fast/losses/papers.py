"""The papers that losses are from, as BibTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dpo_fast.losses.spec import LossSpec

IDS = re.compile(r"arXiv (\d{4}\.\d{5})")
# By their number: first author, title.
PAPERS = {
    "2305.10425": ("Zhao, Yao", "SLiC-HF: Sequence Likelihood Calibration with Human Feedback"),
    "2305.18290": (
        "Rafailov, Rafael",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    ),
    "2309.06657": (
        "Liu, Tianqi",
        "Statistical Rejection Sampling Improves Preference Optimization",
    ),
    "2310.12036": (
        "Azar, Mohammad Gheshlaghi",
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    ),
    "2401.08417": (
        "Xu, Haoran",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine "
        "Translation",
    ),
    "2402.00856": (
        "Ji, Haozhe",
        "Towards Efficient Exact Optimization of Language Model Alignment",
    ),
    "2402.01306": ("Ethayarajh, Kawin", "KTO: Model Alignment as Prospect Theoretic Optimization"),
    "2402.03300": (
        "Shao, Zhihong",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    ),
    "2402.05369": (
        "Chen, Huayu",
        "Noise Contrastive Alignment of Language Models with Explicit Rewards",
    ),
    "2402.13228": (
        "Pal, Arka",
        "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
    ),
    "2403.00409": (
        "Chowdhury, Sayak Ray",
        "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    ),
    "2403.07691": (
        "Hong, Jiwoo",
        "ORPO: Monolithic Preference Optimization without Reference Model",
    ),
    "2404.03715": (
        "Rosset, Corby",
        "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences",
    ),
    "2404.04656": (
        "Jung, Seungjae",
        "Binary Classifier Optimization for Large Language Model Alignment",
    ),
    "2404.19733": ("Pang, Richard Yuanzhe", "Iterative Reasoning Preference Optimization"),
    "2405.00675": ("Wu, Yue", "Self-Play Preference Optimization for Language Model Alignment"),
    "2405.14734": (
        "Meng, Yu",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    ),
    "2406.05882": (
        "Melnyk, Igor",
        "Distributional Preference Alignment of LLMs via Optimal Transport",
    ),
    "2406.08414": (
        "Lu, Chris",
        "Discovering Preference Optimization Algorithms with and for Large Language Models",
    ),
    "2406.09215": ("Chen, Yuxin", "On Softmax Direct Preference Optimization for Recommendation"),
    "2408.06266": (
        "D'Oosterlinck, Karel",
        "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in "
        "Alignment",
    ),
    "2411.10442": (
        "Wang, Weiyun",
        "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference "
        "Optimization",
    ),
    "2411.15124": (
        "Lambert, Nathan",
        "Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
    ),
    "2503.14476": ("Yu, Qiying", "DAPO: An Open-Source LLM Reinforcement Learning System at Scale"),
    "2503.20783": ("Liu, Zichen", "Understanding R1-Zero-Like Training: A Critical Perspective"),
    "2507.18071": ("Zheng, Chujie", "Group Sequence Policy Optimization"),
}


def numbers(specs: Iterable[LossSpec]) -> list[str]:
    """The arXiv numbers of the papers of some losses, each once."""
    return list(dict.fromkeys(n for spec in specs for n in IDS.findall(spec.source)))


def bibtex(number: str) -> str:
    """The entry of a paper by its arXiv number; of one that is not in the table, what the number says."""
    year = f"20{number[:2]}"
    author, title = PAPERS.get(number, (None, f"arXiv {number}"))
    key = re.sub(r"\W", "", (author or "arxiv").partition(",")[0].lower()) + year
    fields = {
        "title": f"{{{title}}}",
        "author": author and f"{author} and others",
        "year": year,
        "eprint": number,
        "archivePrefix": "arXiv",
    }
    inner = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{{key},\n{inner}\n}}"
