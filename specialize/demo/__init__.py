"""The demo: SmolLM2-135M specializes itself on the Human Phenotype Ontology, on two CPU cores, in minutes."""
