"""The attacks of AutoAttack that evaluation computes in ways of its own."""
