"""Does a privacy claim survive an attack? Canaries, attacks, a lower bound on epsilon, and metrics of copying."""
