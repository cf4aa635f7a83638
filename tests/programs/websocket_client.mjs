// websocket_client.mjs URL CONNECTIONS: asks until SIGTERM, and says what client.py says.
const [url, connections] = [process.argv[2], Number(process.argv[3])];
const found = { answers: 0, wrong: 0, errors: [], worst_ms: 0, silent_ms: 0, ticks: 0 };
let over = false;
let open = 0;
let waiting = 0;
let heard = 0;

function finish() {
    console.log(JSON.stringify(found));
    process.exit(found.errors.length ? 1 : 0);
}

function fail(error) {
    found.errors.push(error);
    finish();
}

for (let i = 0; i < connections; i++) {
    const socket = new WebSocket(url);
    let sum = 0;
    let first = true;
    let began = 0;
    const ask = () => {
        const number = 1 + Math.floor(Math.random() * 1e6);
        sum += number;
        began = performance.now();
        waiting++;
        socket.send(String(number));
    };
    socket.onopen = ask;
    socket.onerror = (event) => fail(`error: ${event.message ?? event.error ?? event.type}`);
    socket.onclose = (event) => fail(`closed: ${event.code}`);
    socket.onmessage = ({ data }) => {
        if (data === "tick") return void found.ticks++;
        waiting--;
        found.answers++;
        if (data !== String(sum)) found.wrong++;
        const now = performance.now();
        found.worst_ms = Math.max(found.worst_ms, now - began);
        if (heard) found.silent_ms = Math.max(found.silent_ms, now - heard);
        heard = now;
        if (first && ++open === connections) console.log("ready");
        first = false;
        if (!over) ask();
        else if (waiting === 0) finish();
    };
}

process.on("SIGTERM", () => {
    over = true;
    setTimeout(() => fail("no answer"), 60000).unref();
});
