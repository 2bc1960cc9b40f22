"""The YAML recipe: what each key means, what goes together, what decides a result, which models a study has."""
