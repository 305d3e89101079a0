"""What the categories of known data sets are called: records hold their numbers alone."""

# In the order of COCO's ids, whose gaps are closed (tools/refer.py counts the same way).
COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush"""
REFSHAPES = "circle, square, triangle, star"  # as tools/refshapes.py numbers them

NAMES = {
    name: " ".join(text.split()).split(", ")
    for name, text in {"refcoco": COCO, "refshapes": REFSHAPES}.items()
}
LIKE_REFCOCO = "refcoco+", "refcocog", "refcocog_u", "refcocog_g", "grefcoco"
NAMES |= dict.fromkeys(LIKE_REFCOCO, NAMES["refcoco"])


def category_name(dataset: str, category: int) -> str:
    """The name of a category, counted from 0; of an unknown data set its number."""
    names = NAMES.get(dataset, [])
    return names[category] if 0 <= category < len(names) else f"category {category}"
