"""The classes of the four benchmarks, each in the order of its labels, as published with their lists.

`zeroshot2` is the authors' name for the 104/21 split of Sketchy, which other releases call `zeroshot0`. It was
published in two orders of labels: that of SAKE's followers, such as ZSE-SBIR, and that of the authors' next release,
CMCA.
"""


def _names(text):
    return tuple(name.strip() for name in text.replace("\n", " ").split(","))


SKETCHY_SEEN = _names("""
    pig, banana, chair, hotdog, helicopter, bat, piano, car_(sedan), axe, hot-air_balloon, scorpion, pistol, sheep,
    hamburger, pear, trumpet, songbird, window, raccoon, rabbit, fan, motorcycle, penguin, shoe, seagull, frog, cannon,
    crocodilian, hat, pickup_truck, cat, jack-o-lantern, armor, castle, hammer, bicycle, bear, pizza, sailboat,
    saxophone, ant, mouse, ape, apple, sea_turtle, cow, sword, elephant, alarm_clock, couch, table, geyser, bee,
    skyscraper, pretzel, door, guitar, saw, racket, flower, crab, zebra, owl, beetle, cabin, giraffe, kangaroo,
    starfish, shark, knife, hedgehog, wading_bird, eyeglasses, spider, bench, lizard, bread, teapot, rocket, snake,
    hermit_crab, hourglass, dog, fish, seal, dolphin, mushroom, rhinoceros, blimp, violin, jellyfish, spoon, tiger,
    candle, duck, strawberry, lion, lobster, church, turtle
""")

SKETCHY_UNSEEN = _names("""
    cup, swan, harp, squirrel, snail, ray, pineapple, volcano, rifle, scissors, parrot, windmill, teddy_bear, tree,
    wine_bottle, deer, chicken, airplane, wheelchair, tank, umbrella, butterfly, camel, horse, bell
""")

SKETCHY_SPLIT_SEEN = _names("""
    table, teapot, harp, wading_bird, rocket, chicken, armor, ray, turtle, bee, swan, lizard, parrot, tiger, bicycle,
    cannon, shoe, eyeglasses, penguin, butterfly, sheep, pickup_truck, crab, rifle, mushroom, ant, alarm_clock, hammer,
    spoon, umbrella, pizza, fish, frog, hamburger, spider, starfish, hermit_crab, candle, cat, axe, couch, lion,
    pretzel, cup, elephant, hedgehog, teddy_bear, rabbit, horse, hot-air_balloon, shark, strawberry, pistol, zebra,
    jellyfish, dog, pineapple, ape, saxophone, volcano, bell, bear, chair, jack-o-lantern, owl, trumpet, car_(sedan),
    banana, geyser, church, violin, deer, scorpion, seal, racket, camel, fan, pig, tank, flower, sailboat, castle, duck,
    snake, kangaroo, guitar, piano, bench, squirrel, crocodilian, apple, hourglass, motorcycle, hat, knife, bread,
    wine_bottle, blimp, hotdog, airplane, snail, beetle, lobster, sea_turtle
""")

SKETCHY_SPLIT_UNSEEN = _names("""
    bat, cabin, cow, dolphin, door, giraffe, helicopter, mouse, pear, raccoon, rhinoceros, saw, scissors, seagull,
    skyscraper, songbird, sword, tree, wheelchair, windmill, window
""")

# The same split in the authors' next release (CMCA), in another order of labels. Only the files of class names give the
# order of a folder; these serve to name it.
CMCA_SPLIT_SEEN = _names("""
    pig, banana, chair, hotdog, cup, piano, swan, car_(sedan), harp, squirrel, axe, hot-air_balloon, scorpion,
    pistol, snail, sheep, ray, hamburger, trumpet, pineapple, rabbit, fan, motorcycle, volcano, penguin, shoe, frog,
    cannon, crocodilian, rifle, hat, pickup_truck, cat, jack-o-lantern, armor, castle, hammer, bicycle, bear, pizza,
    sailboat, saxophone, ant, parrot, ape, apple, sea_turtle, elephant, alarm_clock, couch, table, geyser, bee,
    pretzel, guitar, racket, flower, crab, zebra, teddy_bear, owl, beetle, wine_bottle, kangaroo, starfish, shark,
    knife, hedgehog, deer, wading_bird, chicken, eyeglasses, spider, airplane, tank, bench, lizard, bread, teapot,
    rocket, umbrella, snake, hermit_crab, hourglass, dog, fish, seal, butterfly, mushroom, blimp, violin, camel,
    jellyfish, horse, spoon, tiger, bell, candle, duck, strawberry, lion, lobster, church, turtle
""")

CMCA_SPLIT_UNSEEN = _names("""
    helicopter, bat, pear, songbird, window, raccoon, seagull, scissors, mouse, windmill, cow, sword, skyscraper,
    door, saw, tree, cabin, giraffe, wheelchair, dolphin, rhinoceros
""")

# Numbers of published test sketches of SKETCHY_SPLIT_UNSEEN. No two are equal, so they name the labels of features.
SKETCHY_SPLIT_UNSEEN_SKETCHES = (
    635, 546, 728, 590, 578, 673, 746, 670, 575, 735, 556, 532, 558, 666, 545, 529, 605, 533, 542, 598, 554,
)  # fmt: skip

TUBERLIN_SEEN = _names("""
    wrist-watch, pig, alarm clock, chair, tablelamp, nose, trousers, boomerang, van, sponge bob, mouse (animal), book,
    angel, donut, tire, helicopter, tomato, skateboard, cup, dragon, feather, piano, present, flying saucer, swan,
    microphone, bed, calculator, harp, tent, truck, radio, squirrel, teddy-bear, axe, scorpion, snail, house, cloud,
    chandelier, cactus, sheep, tv, fork, revolver, hamburger, pear, trumpet, pineapple, bear (animal), sun, comb, purse,
    rabbit, submarine, floor lamp, computer-mouse, ship, seagull, frog, cigarette, panda, eye, cannon, standing bird,
    camera, rifle, potted plant, sea turtle, hat, cat, keyboard, mug, syringe, castle, hammer, palm tree, bicycle, bush,
    helmet, human-skeleton, sailboat, key, saxophone, pen, scissors, monkey, hot-dog, parking meter, parrot,
    door handle, grenade, snowman, ear, vase, suv, apple, bathtub, megaphone, flying bird, leaf, backpack, wheel, cow,
    mosquito, ipod, santa claus, shovel, person walking, sword, walkie talkie, elephant, socks, couch, screwdriver,
    race car, person sitting, bee, skyscraper, traffic light, pretzel, pickup truck, beer-mug, door, guitar,
    baseball bat, paper clip, pumpkin, mouth, hand, tennis-racket, car (sedan), cell phone, crab, zebra, motorbike,
    pipe (for smoking), owl, armchair, tree, loudspeaker, octopus, bulldozer, giraffe, kangaroo, mailbox, cake,
    satellite, head-phones, head, wine-bottle, crane (machine), shark, grapes, rainbow, mermaid, bookshelf, knife,
    hedgehog, fire hydrant, barn, face, bowl, eyeglasses, carrot, moon, spider, binoculars, crocodile, airplane, ladder,
    toothbrush, toilet, bench, power outlet, tooth, teapot, arm, lightbulb, umbrella, snake, speed-boat, hourglass, dog,
    fish, flashlight, ice-cream-cone, butterfly, wheelbarrow, skull, dolphin, mushroom, blimp, basket, violin,
    microscope, train, stapler, flower with stem, envelope, camel, diamond, wineglass, cabinet, foot, spoon, tiger,
    bell, candle, duck, satellite dish, crown, strawberry, rooster, lion, computer monitor, lobster, pigeon, church,
    ashtray
""")

TUBERLIN_UNSEEN = _names("""
    banana, bus, tractor, suitcase, streetlight, telephone, bottle opener, canoe, fan, teacup, penguin, laptop, shoe,
    lighter, hot air balloon, pizza, brain, ant, t-shirt, trombone, windmill, snowboard, table, rollerblades, parachute,
    space shuttle, bridge, frying-pan, bread, horse
""")

QUICKDRAW_SEEN = _names("""
    teapot, bee, swan, bandage, sink, parrot, map, monkey, bicycle, shoe, eyeglasses, penguin, butterfly, sheep,
    pickup_truck, car, crab, rifle, mushroom, ant, alarm_clock, hammer, spoon, mountain, umbrella, pizza, fish, spider,
    candle, cat, axe, couch, lion, cup, elephant, hedgehog, teddy_bear, rabbit, horse, hot-air_balloon, dog, pineapple,
    cruise ship, lighthouse, saxophone, bear, chair, owl, hurricane, church, violin, wine bottle, scorpion, camel,
    eiffel tower, pig, flower, sailboat, moon, castle, skateboard, soccer ball, duck, snake, kangaroo, train, guitar,
    bench, squirrel, crocodilian, apple, bus, chandelier, motorcycle, hat, knife, airplane, snail, lobster, sea_turtle
""")

QUICKDRAW_UNSEEN = _names("""
    bat, cow, dolphin, door, giraffe, helicopter, mouse, raccoon, rhinoceros, saw, scissors, skyscraper, tree, windmill,
    feather, campfire, palm tree, fire_hydrant, bread, beach, megaphone, cactus, zebra, tiger, shark, frog, banana,
    cake, hamburger, fan
""")

# The WordNet ids (without their n) of Sketchy's seen classes whose photos have more than one id. The ids of a class
# are in the order of the published list of training photos. No other file has this order, and the
# published mask depends on it.
SKETCHY_WORDNET_IDS = _names("""
    02738535 03001627, 02139199 02147328 02149420 02147947 02142407, 02958343 04166281, 03541923 02782093, 04086273
    03948459, 02411705 02412080 02413131 02414290 02412210, 07697313 07697100, 07768230 07767847 12651611, 01594787
    01530575 01532829 01527347 01531178 01534433 01592084 01558993 01537544 01569566, 03227184 04589593 04239333
    04587648 03395514, 02055803 02056570, 04593524 04546081 03680355 04120489 04199027 02882894, 01641577 01639765
    01641391, 01698640 01697457, 03497657 03124170 02859184 02954340 04259630 03028785, 02895154 03000247 03146219,
    02834778 03792782 04126066, 02481500 02483708 02483362 02481823 02480495 02470325, 01663401 01664065 01665541,
    01887787 02404432 02404186 02403454 02406174, 04373894 03039493 04147793, 03201208 04379243 04379964, 03222176
    03222318 03226880, 03467517 02676566 03272010, 04140064 02770585 03474779, 02772700 04409806 04039381, 11669921
    11939491 11978713, 01978455 01978930 01980166 01978287 01981276 01979526, 02165105 02169497 02168699 02167151
    02176261, 02932400 03686924, 01482330 01489920 01491361 01494475 01487506 01483021, 03624134 02973904 02976123,
    02346627 01872401 01894207, 02009912 02002724 02012849 02000954 02007558, 04356056 04272054, 03891251 02828884,
    01674464 01680478 01683558 01693334, 07682316 07683786 07687469 07684084 07687211 07679356, 03773504 04099429
    04415663 03799375, 01748264 01729977 01726692 01752165, 02106662 02103406 02109525, 02643566 02605316 02537525
    02513560 02655020 02607072 02567633 02641379 02606052 02564403 02534734 02542958 02514041 02607470 02512053 02539424
    01440764 02631628 01447331, 02076196 02077923, 02068974 02072040 02070430, 12998815 12997919, 02803934 04536866,
    03633091 04597913 04284002 04350769, 01983481 01985128
""")
