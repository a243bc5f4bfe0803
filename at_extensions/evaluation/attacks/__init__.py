"""AutoAttack's attacks in faster forms, with the same verdicts as upstream's."""
