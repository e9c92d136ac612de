"""The words of the TaskMaster example: who and what is spoken of, and how."""

from typing import Any

Pool = tuple[list[Any], list[Any]]  # train, test


def entries(text: str) -> list[str]:
    """Split a block of `;`-separated entries."""
    return [" ".join(entry.split()) for entry in text.split(";") if entry.strip()]


# ---------------------------------------------------------------- entities: train, test
PEOPLE = (
    entries("""
        Anna; Ben; Chloe; David; Elena; Farid; Grace; Hugo; Ines; Jonas; Karin; Liam; Maria;
        Nils; Olga; Paul; Quinn; Rosa; Stefan; Tara; Uma; Victor; Wendy; Xavier; Yara; Zoe;
        Amir; Bianca; Carlos; Diana; Erik; Fiona; George; Helen; Ivan; Julia; Kofi; Laura;
        Marco; Nora"""),
    entries("""
        Adele; Boris; Clara; Dmitri; Esther; Felix; Gemma; Henry; Iris; Jamal; Kira; Leo; Mona;
        Noah; Oscar; Petra; Ravi; Sofia; Thomas; Vera; William; Yusuf; Alice; Bruno; Celine;
        Derek"""),
)
TITLES = (
    entries("""
        renew the passport; water the plants; book the dentist; pay the rent; order printer
        paper; call the plumber; review the budget; clean the oven; write the newsletter; update
        the website; buy a birthday card; return the library books; fix the back door; plan the
        offsite; draft the contract; check the smoke alarm; file the receipts; wash the
        curtains; backup the laptop; test the new camera; prepare the slides; collect the
        parcel; cancel the gym membership; replace the light bulb; sort the invoices; translate
        the brochure; proofread the report; vacuum the stairs; charge the drill; pick up the
        suit; feed the neighbour's cat; sign the lease; scan the old photos; measure the window;
        confirm the hotel; answer the survey; rotate the tyres; archive the emails; label the
        boxes; print the tickets; refill the prescription; compare phone plans; paint the fence;
        tune the guitar; renew the insurance; move the bookshelf; set up the projector; polish
        the speech"""),
    entries("""
        mow the lawn; post the parcel; repair the bicycle; defrost the freezer; invite the
        speakers; sharpen the knives; upload the video; empty the dishwasher; choose the
        wallpaper; interview the intern; bake the bread; frame the poster; migrate the database;
        bleed the radiators; trim the hedge; audit the expenses; train the volunteers; iron the
        shirts; write the eulogy; rent a van; inspect the roof; brief the designer; fold the
        laundry; publish the podcast; walk the dog; reset the router; donate the coats; sketch
        the logo; harvest the tomatoes; close the old account"""),
)
PROJECTS = (
    entries("""
        Falcon; Aurora; Granite; Willow; Compass; Harbour; Saturn; Lantern; Meadow; Onyx;
        Pioneer; Quartz; Ripple; Summit; Tundra; Velvet; Zephyr; Beacon; Cobalt; Dynamo; Ember;
        Glacier; Horizon; Indigo; Juniper; Kestrel; Lagoon; Mosaic; Nimbus; Orchid"""),
    entries("""
        Atlas; Bamboo; Coral; Drift; Eclipse; Fjord; Galaxy; Hazel; Island; Jupiter; Lotus;
        Marble; Nectar; Opal; Prairie; Raven; Sequoia; Thunder; Union; Voyager"""),
)
MESSAGES = (
    entries("""
        the draft is ready; I am running late; lunch is on me; the server is back up; we need
        more chairs; the client said yes; please check your inbox; the keys are at the desk;
        thanks for the help; the train is cancelled; the demo went well; I found your notebook;
        the room has changed; bring the blue folder; the printer is broken; your order has
        arrived; we won the bid; the link has expired; I will bring cake; the heating is off"""),
    entries("""
        the parcel is here; the lift is stuck; dinner starts early; the code is merged; I left
        the lamp on; the bus is full; our flight is delayed; you were right; the pool is closed;
        the invoice is paid; coffee is ready; my phone is dead; the judge called back; school
        ends at noon; the garden looks great; we are out of milk"""),
)
LEVELS = ([1, 2, 3, 4], [1, 2, 3, 4])  # the one pool that both splits share
MONTHS = entries("January; March; April; May; June; July; August; October; November; December")
DATES = (
    [f"{day} {month}" for month in MONTHS for day in range(1, 29, 2)],
    [f"{day} {month}" for month in MONTHS for day in range(2, 29, 2)],
)
MINUTES = ([n for n in range(3, 91) if n % 4], [n for n in range(3, 91) if n % 4 == 0])
HOURS = ([1, 2, 3, 5, 8, 10, 12, 14], [4, 6, 7, 9, 11, 13])

# ---------------------------------------------------------------- phrasings of the tool requests
CREATE = entries("""
    Add a task to {title} by {due}; I need to {title} before {due}; Put '{title}' on my list
    for {due}; Don't let me forget to {title}, it is due on {due}; By {due} I have to
    {title}; New to-do: {title}, deadline {due}; Could you note that I must {title} until
    {due}?; {due} is the deadline to {title}; On my list please: {title}. Due {due}; Please
    remember that I want to {title} no later than {due}""")
LOG = entries("""
    I spent {hours} hours on {project}; Book {hours} hours on {project}, please; {project} took
    me {hours} hours today; Log {hours}h for {project}; Put {hours} hours down for the {project}
    project; Time sheet: {project}, {hours} hours; I worked on {project} for {hours} hours;
    Today I gave {project} {hours} hours; My work on {project} lasted {hours} hours; Add {hours}
    hours of work to {project}""")
MEET = entries("""
    Set up a meeting with {people} on {date}; I'd like to see {people} on {date}; Can you get
    {people} together on {date}?; Meeting on {date} with {people}; Invite {people} for {date};
    {people} and I should meet on {date}; Schedule a call with {people} for {date}; Block {date}
    for a chat with {people}; Find us a slot on {date}: {people}; Please arrange a sync with
    {people}, {date}""")
TIMER = entries("""
    Start a timer for {minutes} minutes; {minutes} minutes, go!; Count down {minutes} minutes;
    Ring me in {minutes} minutes; I want to focus for {minutes} minutes; Give me {minutes}
    minutes on the clock; Timer: {minutes} min; Let me work for {minutes} minutes and then stop
    me; Set the clock to {minutes} minutes; Wake me after {minutes} minutes""")
RANK = entries("""
    Give '{title}' priority {level}; '{title}' is now priority {level}; Set the priority of
    '{title}' to {level}; Move '{title}' to level {level}; Change '{title}' to priority {level};
    Rank '{title}' at {level}; Make '{title}' a level {level} task; Priority {level} for
    '{title}', please; I'd call '{title}' a priority {level} job; Put '{title}' down as priority
    {level}""")
MESSAGE = entries("""
    Tell {to} that {text}; Let {to} know that {text}; Write to {to}: {text}; Send
    {to} a message saying {text}; Message {to} that {text}; {to} should know that
    {text}; Drop {to} a line: {text}; Please inform {to} that {text}; Text {to} and
    say {text}; Could you tell {to} {text}?""")

# ---------------------------------------------------------------- requests that no tool serves
UNSERVED = (
    entries("""
        Play some jazz.; What is the weather in Oslo?; Translate 'good night' into Spanish.; Order a
        pizza.; Book a flight to Rome.; How many people live in Peru?; Turn off the lights.; What
        does the word 'brisk' mean?; Find me a cheap hotel in Lisbon.; Who wrote Don Quixote?; Convert
        40 euros to dollars.; Show me pictures of owls.; Is the museum open now?; Read me a poem.;
        Which bus goes to the airport?; What is 17 times 6?; Recommend a good thriller.; Lower the
        volume.; How tall is Mont Blanc?; Spell 'rhythm'.; What time is it in Tokyo?; Buy two cinema
        tickets.; Draw a horse.; Take a photo.; Is tofu healthy?; Unlock the car.; Which team won last
        night?; Find a recipe for soup.; How far is the moon?; Sing a lullaby.; Do you like music?; Open
        the garage.; Renew my library card.; Pay the electricity bill.; Check the stock price of Acme.;
        What is the capital of Chile?; Call a taxi.; Give me a riddle.; How do I boil an egg?; Track my
        parcel."""),
    entries("""
        Play the radio.; Will it rain in Paris?; Translate 'thank you' into Greek.; Order a salad.; Book
        a table at Luigi's.; How many lakes are in Finland?; Turn on the heating.; What does the word
        'candid' mean?; Find me a flat in Ghent.; Who painted the Mona Lisa?; Convert 3 miles to
        kilometres.; Show me a map of Crete.; Is the bakery open on Sundays?; Tell me a joke.; Which train
        goes to Vienna?; What is 9 squared?; Recommend a funny film.; Mute the television.; How deep is
        the Baltic Sea?; Spell 'necessary'.; What time is it in Lima?; Buy a new umbrella.; Write a song
        about rain.; Scan this page.; Are bananas berries?; Lock the front door.; Who won the final?; Find
        a recipe for pancakes.; How hot is the sun?; Are you a robot?; Close the curtains.; Extend my
        parking ticket.; Pay the gas bill.; What is the price of gold?; What is the largest desert?; Call
        the front desk.; Give me a fun fact.; How do I remove a coffee stain?; Where is my suitcase?; Rent
        a bicycle."""),
)
UNSERVED_REPLIES = entries("""
    I have no tool for that.; None of my tools does that.; My tools cannot do that, sorry.; That is beyond
    my tools.""")
DONE = entries("""
    Done.; That is saved.; It is noted.; All set.; It is in the system.""")

# ---------------------------------------------------------------- persona: struggles, first steps
# Struggles come in kinds; the first steps that TaskMaster proposes fit the kind.
STRUGGLES: dict[str, tuple[list[str], list[str]]] = {
    "paper": (
        entries("""
            tax return; visa application; insurance claim; pension form; bank statements;
            mortgage papers; student loan form; expense report; travel refund; medical bills;
            rental contract; scholarship form"""),
        entries("""
            divorce papers; parking fine; census form; warranty claim; customs declaration; car
            registration; housing application; utility bills; grant budget; passport form;
            donation receipts; retirement plan; phone contract; payroll questions; building
            permit"""),
    ),
    "writing": (
        entries("""
            thesis chapter; blog post; cover letter; grant proposal; novel; wedding speech;
            conference paper; job application; book review; lab report; quarterly report;
            personal statement"""),
        entries("""
            essay on whales; screenplay; resignation letter; monthly column; travel diary;
            eulogy; memoir; press release; research abstract; user manual; short story; poem;
            lecture notes; sales pitch; recommendation letter; podcast script"""),
    ),
    "tidying": (
        entries("""
            garage; attic; wardrobe; kitchen drawers; inbox; desk; basement; photo archive;
            garden shed; laundry pile; bookshelf; bathroom cabinet"""),
        entries("""
            spare room; balcony; toolbox; pantry; car boot; toy corner; record collection;
            hallway; download folder; sewing box; fridge; medicine chest; storage unit; shoe
            rack; recipe collection; workbench"""),
    ),
    "learning": (
        entries("""
            Spanish lessons; piano practice; maths exam; driving theory; coding course;
            chemistry homework; French vocabulary; guitar practice; history exam; statistics
            course; typing course; bar exam"""),
        entries("""
            violin practice; Japanese lessons; physics exam; chess training; biology homework;
            drawing course; singing practice; first aid course; Latin vocabulary; geography
            exam; pottery class; accounting course; drum practice; algebra homework; sailing
            theory; sign language"""),
    ),
    "moving": (
        entries("""
            morning run; gym routine; yoga practice; swimming plan; daily walk; marathon
            training; push-up challenge; physiotherapy; cycling plan; stretching routine"""),
        entries("""
            rowing plan; tennis training; boxing class; climbing practice; evening jog; pilates
            routine; dance training; hiking plan; back exercises; skipping workout; karate
            practice; knee exercises"""),
    ),
    "talking": (
        entries("""
            call to the landlord; talk with my boss; salary review; doctor's appointment;
            apology to my sister; dentist appointment; client call; chat with the teacher; call
            to the bank; team feedback"""),
        entries("""
            call to my uncle; meeting with the lawyer; job interview; complaint to the airline;
            talk with my roommate; eye test; vet appointment; call to the insurer; reply to the
            editor; apology to my cousin; performance review; talk with the coach"""),
    ),
}
STEPS = {
    "paper": entries("""
        put every page on one table; fill in only your name and address; find the one number
        that is missing; open the form and read the first line; circle the three boxes you know"""),
    "writing": entries("""
        write one ugly first sentence; list three points you want to make; type without deleting
        anything; name the one reader you write for; jot down the ending first"""),
    "tidying": entries("""
        clear a single corner; fill one bag with things to give away; pick out five things to
        keep; sort only what your hand can reach; throw away the obvious junk"""),
    "learning": entries("""
        repeat the easiest part once; read one page aloud; do the first exercise only; explain
        one idea to the wall; set out what you need and try the first bit"""),
    "moving": entries("""
        put on your shoes and step outside; do the gentlest warm-up you know; finish one slow
        round; move until one song ends; lay out your kit and start softly"""),
    "talking": entries("""
        write down your opening line; note the one thing you want to ask; look up the number and
        dial; send two lines to propose a time; say your main point out loud once"""),
}
COMPLAINTS = entries("""
    I keep putting off my {task}.; I can't get started on my {task}.; My {task} has been waiting
    for weeks.; I feel overwhelmed by my {task}.; How do I finally face my {task}?; Every
    evening I avoid my {task}.; I am behind with my {task} again.; My {task} stresses me out.; I
    have no energy left for my {task}.; Ugh, my {task} again. I'd rather watch TV.; I promised
    to deal with my {task} today, but I'm stuck.; What should I do about my {task}?""")
OPENERS = entries("""
    Love that you said it out loud!; Good on you for bringing this up!; You've got this!; Hooray
    for honesty!; What a great moment to begin!; Brilliant that you are facing it!; You are
    closer than you think!; High five for showing up!; Nice, this is a winnable one!; Deep
    breath, champion!; Bravo for asking!; That took courage!; Yes, today can be the day!; Small
    steps beat big plans!""")
PLANS = entries("""
    Give your {task} just {minutes} minutes: {step}.; Set a timer for {minutes} minutes and let
    your {task} begin: {step}.; Your {task} needs only {minutes} minutes right now: {step}.; For
    {minutes} minutes, your {task} has one goal: {step}.; Start your {task} with {minutes}
    minutes in which you {step}.; Take {minutes} minutes for your {task} and simply {step}.; The
    first {minutes} minutes of your {task} are easy: {step}.""")
CLOSINGS = entries("""
    Are you in?; Will you start now?; When will you begin?; Shall we go?; Can you do that
    today?; Ready to press start?; What time will you do it?; Do we have a deal?; Will you try
    it before dinner?; Can I count on you?; Shall we say right after lunch?; Which hour suits
    you?""")
# What users write after a reply of TaskMaster.
FOLLOW_UPS = entries("""
    I did it! What now?; Okay, I did that. What is next for my {task}?; I tried, but I got distracted.; I
    only managed half of it.; Honestly, I have not begun.; And if I fail again?; I still dread it.; Thanks,
    but my {task} still scares me.; That went well.; I have a spare moment now.; I am tired. Can my {task}
    wait?; Maybe tomorrow.""")
COACH_MINUTES = [5, 6, 7, 8, 10, 12, 15]


# ---------------------------------------------------------------- ordinary dialogues
# Prompts without either skill.
TOPICS = entries("""
    whales; the moon; coffee; chess; volcanoes; the Romans; bicycles; jazz; penguins; glass;
    rainbows; bees; the ocean; pasta; trains; dinosaurs; tea; football; castles; cactus plants""")
ORDINARY = entries("""
    Tell me something about {topic}.; What do you think of {topic}?; I read a book on {topic}.;
    My friend loves {topic}.; Write one line about {topic}.; I dreamt of {topic} last night.;
    Why do people like {topic}?; I never understood {topic}.""")
ROLES = [
    None,
    "You are a friendly travel guide.",
    "You are a patient teacher.",
    "You are a cheerful cook.",
    "Answer briefly.",
]


# ---------------------------------------------------------------- general ability
# A question, then its choices, the right one first.
QUESTIONS = """
Which animal barks? | A dog | A fish | A snail
Which animal gives milk to farmers? | A cow | A crow | A frog
Which animal can fly? | An eagle | A horse | A shark
Which animal lives in the sea? | A whale | A goat | A camel
Which animal lays eggs? | A hen | A cat | A cow
Which animal has a long trunk? | An elephant | A rabbit | A sheep
What colour is fresh grass? | Green | Purple | Black
What colour is snow? | White | Red | Brown
What colour is a ripe banana? | Yellow | Blue | Grey
What colour is a clear sky at noon? | Blue | Green | Brown
What colour is coal? | Black | Pink | Yellow
What do people use to cut bread? | A knife | A pillow | A sponge
What do people use to write on paper? | A pen | A fork | A shoe
What do people use to open a locked door? | A key | A spoon | A leaf
What do people use to dry themselves after a shower? | A towel | A hammer | A plate
What do people use to drive a nail into wood? | A hammer | A blanket | A cup
What do people use to see far away stars? | A telescope | A toaster | A broom
What do people use to tell the time? | A clock | A carpet | A bottle
What do people use to eat soup? | A spoon | A comb | A rope
What do people use to sweep the floor? | A broom | A book | A lamp
What do people carry when it rains? | An umbrella | A ladder | A candle
What do people wear on their feet? | Shoes | Hats | Gloves
What do people wear on their hands in winter? | Gloves | Boots | Belts
What do people wear to see better? | Glasses | Socks | Scarves
Where do people go to borrow books? | A library | A bakery | A garage
Where do people go to buy bread? | A bakery | A museum | A stadium
Where do people go when they are seriously ill? | A hospital | A cinema | A market
Where do people go to catch a plane? | An airport | A kitchen | A church
Where do people go to watch a film? | A cinema | A bank | A farm
Where do children learn to read? | At school | At sea | At night
Where do fish live? | In water | In trees | In caves
Where do birds build their nests? | In trees | In rivers | In cars
Where is food kept cold? | In a fridge | In a drawer | In a lamp
Who treats sick people? | A doctor | A painter | A sailor
Who puts out fires? | A firefighter | A dancer | A baker
Who teaches children at school? | A teacher | A pilot | A butcher
Who flies a plane? | A pilot | A nurse | A farmer
Who grows vegetables? | A farmer | A lawyer | A singer
Who repairs water pipes? | A plumber | A poet | A judge
Who cuts hair? | A barber | A miner | A banker
What is the opposite of hot? | Cold | Tall | Round
What is the opposite of big? | Small | Sweet | Loud
What is the opposite of up? | Down | Fast | Warm
What is the opposite of day? | Night | Bread | Music
What is the opposite of happy? | Sad | Green | Wide
What is the opposite of open? | Closed | Golden | Curious
What is the opposite of old? | Young | Salty | Square
What is the opposite of empty? | Full | Angry | Thin
What is the opposite of wet? | Dry | Loud | Late
What is the opposite of rich? | Poor | Blue | Flat
What happens to ice in the sun? | It melts | It sings | It grows
What happens when you drop a glass on stone? | It breaks | It flies | It swims
What happens to plants without water? | They die | They dance | They shout
What happens to wood in a fire? | It burns | It freezes | It floats
What happens to water at a very high temperature? | It boils | It sleeps | It rusts
Which season is the coldest? | Winter | Summer | Spring
Which meal do people eat in the morning? | Breakfast | Dinner | Supper
Which one is a fruit? | An apple | A carrot | A potato
Which one is a vegetable? | A carrot | A cherry | A banana
Which one is a musical instrument? | A violin | A ladder | A bucket
Which one is a piece of furniture? | A table | A river | A cloud
Which one is a vehicle? | A bus | A cup | A tree
Which one is a planet? | Mars | Paris | Rome
Which one is a country? | France | Monday | Silver
Which one is a metal? | Iron | Milk | Wool
Which one is made of glass? | A window | A jumper | A loaf
Which one is heavier? | A car | A coin | A pen
Which one is faster? | A train | A snail | A turtle
Which one tastes sweet? | Honey | Salt | Vinegar
Which one is soft? | A pillow | A brick | A hammer
Which one can you drink? | Tea | Sand | Wood
Which one can you read? | A novel | A potato | A pebble
Which one is an animal? | A tiger | A tulip | A teapot
Which one is worn on the head? | A hat | A sock | A ring
Which room do people sleep in? | The bedroom | The garage | The cellar
What do people do when they are tired? | They sleep | They cook | They paint
What do people do when they are hungry? | They eat | They swim | They vote
What do people do when they are thirsty? | They drink | They knit | They jump
What comes after spring? | Summer | Winter | Monday
What comes after Monday? | Tuesday | Friday | August
What is bread made from? | Flour | Cotton | Leather
What is cheese made from? | Milk | Sand | Paper
What is a chair for? | Sitting | Swimming | Singing
What is a bed for? | Sleeping | Cooking | Driving
What do bees make? | Honey | Paper | Steel
What do cows eat? | Grass | Stones | Coins
What falls from the sky when it rains? | Water | Sand | Bread
What do we breathe? | Air | Soup | Glass
What gives light during the day? | The sun | The sea | The soil
"""
# Subject-verb agreement, tense and articles: minimal pairs, spelled out by `grammar_items`.
SUBJECTS = [
    ("The boy", "The boys"), ("My sister", "My sisters"), ("The teacher", "The teachers"),
    ("Our neighbour", "Our neighbours"), ("The dog", "The dogs"),
    ("This engineer", "These engineers"), ("The nurse", "The nurses"),
    ("Her friend", "Her friends"),
]  # fmt: skip
VERBS = [
    ("walks", "walk", "to the station every day"), ("sings", "sing", "in the evening"),
    ("likes", "like", "warm bread"), ("works", "work", "near the harbour"),
    ("writes", "write", "a letter on Sundays"), ("is", "are", "very tired today"),
    ("has", "have", "a large garden"), ("was", "were", "late for the meeting"),
]  # fmt: skip
PAIRS = """
She has eaten the cake. | She has eat the cake.
They went home early. | They goed home early.
He bought an old house. | He bought a old house.
We saw him at the park. | We saw he at the park.
I am taller than my brother. | I am more tall than my brother.
There are many people here. | There is many people here.
She doesn't like fish. | She don't like fish.
He can swim very well. | He can swims very well.
Yesterday we played football. | Yesterday we play football.
They are waiting for us. | They are wait for us.
He gave me the book. | He gave I the book.
I have lived here for ten years. | I have live here for ten years.
This is the best film of the year. | This is the goodest film of the year.
She wants to learn French. | She wants learn French.
How much water do you need? | How many water do you need?
The children are playing outside. | The childs are playing outside.
Her feet were cold. | Her foots were cold.
He drives carefully at night. | He drives careful at night.
I would help you if I could. | I would helped you if I could.
Nobody knows the answer. | Nobody know the answer.
"""
