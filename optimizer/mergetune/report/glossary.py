"""The report's terms, each explained in a sentence or two for readers who are no statisticians."""

from __future__ import annotations

GLOSSARY = {
    "base": "The model that all experts were fine-tuned from.",
    "expert": "A fine-tune of the base that is good at one thing.",
    "merge": "A model whose weights are mixed from the base's and the experts'. It costs no more to serve.",
    "coefficient": "How much of an expert's change to the base a merge takes. 0: nothing; 1: all of it.",
    "objective": "A score that should be as good as possible.",
    "guard": "A score that may not get worse than a reference by more than a margin.",
    "margin": "How much worse a guard may be than its reference.",
    "front": "The candidates that no other beats in every objective: each is the best at some balance.",
    "p(front)": "How probably a candidate is on the front by the study's own limits: in which share of the "
    "resamples it is.",
    "resample": "The same items drawn again at random, to see how much hangs on which items were asked.",
    "± (standard error)": "How far a score is off by the chance of which items were asked. In two "
    "cases of three the true value is within it.",
    "95% interval": "Where the true value lies in 95 of 100 such cases.",
    "worst loss": "What a candidate loses where it loses most: the share of the best expert's gain over the "
    "base that it does not keep, times the objective's weight.",
    "smoothed": "A score that also counts what similar merges scored, so that luck counts less. A merge is "
    "chosen by these scores where they can be computed.",
    "search items": "The items that merges were scored and chosen on. They flatter what was chosen.",
    "held-out items": "Items that the search never saw. What they say is not flattered.",
    "finalist": "A merge that was measured on the held-out items, fixed before any of them was.",
    "optimism": "By how much the search items flatter a merge.",
    "hypervolume": "One number for how good a front is: the room under it, above the base's scores.",
    "luck": "As measured a candidate meets the limits, but fewer than 95% of the resamples agree.",
    "slice": "The items that have something in common, such as a language.",
}
