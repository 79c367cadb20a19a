"""The shipped recipes: module `<name>` holds one function of the same name that returns a `Recipe`."""
