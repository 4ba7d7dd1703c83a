"""A study: whole simulated federations over a grid of settings. `fedistill.bench` compares methods without a federation."""
