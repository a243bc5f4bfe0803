"""AutoAttack's attacks in faster forms: the same verdicts as upstream's."""
