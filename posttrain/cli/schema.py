"""`posttrain schema`: the JSON schema of a resolved recipe."""

import json

import click


def _schema() -> None:
    from posttrain.recipe.types import Recipe

    click.echo(json.dumps(Recipe.model_json_schema(), indent=2))


schema = click.Command("schema", callback=_schema, help="Print the JSON schema of recipes.")
