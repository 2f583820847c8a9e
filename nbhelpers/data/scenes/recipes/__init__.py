"""One recipe per scene class of the generated data set."""
from nbhelpers.data.scenes.recipes import land, leisure, town, water, works

RECIPES = {
    "airport": works.airport, "bareland": land.bareland, "baseballfield": leisure.baseballfield,
    "beach": water.beach, "bridge": water.bridge, "center": town.center, "church": town.church,
    "commercial": town.commercial, "denseresidential": town.dense, "desert": land.desert,
    "farmland": land.farmland, "forest": land.forest, "industrial": works.industrial,
    "meadow": land.meadow, "mediumresidential": town.medium, "mountain": land.mountain,
    "park": leisure.park, "parking": works.parking, "playground": leisure.playground, "pond": water.pond,
    "port": water.port, "railwaystation": works.railwaystation, "resort": leisure.resort,
    "river": water.river, "school": leisure.school, "sparseresidential": town.sparse,
    "square": town.square, "stadium": leisure.stadium, "storagetanks": works.storagetanks,
    "viaduct": works.viaduct}
